"""
Train one step of a recipe: `accelerate launch train.py CONFIG.yaml [--key value ...]`.

The same command again continues a run that was stopped, from its newest complete checkpoint;
`--resume_from_checkpoint false` begins anew. The finished model is in `output_dir/final`, from which the next step
starts. `--help` lists the keys; configs/ holds examples.
"""

import logging
import os
import sys

from transformers import AutoTokenizer, Trainer

from lusifer_hf.data.collators import AlignmentCollator, RepresentationCollator
from lusifer_hf.data.mixture import Mixture, MixtureStream, load_mixture
from lusifer_hf.training.alignment import AlignmentTrainer
from lusifer_hf.training.arguments import Run, parse_run
from lusifer_hf.training.evaluation import load_eval_sources
from lusifer_hf.training.loading import check_fits, embedding_model, load_for_stage, save_final
from lusifer_hf.training.representation import RepresentationTrainer


logger = logging.getLogger("lusifer_hf.train")

TRAINERS = {"alignment": AlignmentTrainer, "representation": RepresentationTrainer}


def prepare(argv: list[str]) -> tuple[Run, Trainer]:
    """Everything that can be wrong before a step is made: arguments first, then data, then the model."""
    run = parse_run(argv)
    run.check_files()
    evaluates = run.training.eval_strategy != "no"
    eval_sources = load_eval_sources(run.eval_data) if evaluates else None
    with run.training.main_process_first(desc="reading the data"):
        data = load_data(run)
    if isinstance(data, Mixture):
        TRAINERS[run.stage].make_sampler(data, run.training)  # is there a batch of each data set?
    model = load_for_stage(run.stage, run.model)
    check_fits(run.training, model)
    return run, make_trainer(run, model, data, eval_sources)


def load_data(run: Run) -> Mixture | MixtureStream:
    training = run.training
    if run.stage == "alignment" and training.streaming:
        return MixtureStream(
            run.data,
            batch_size=training.per_device_train_batch_size,
            num_processes=training.world_size,
            process_index=training.process_index,
            seed=training.data_seed,
        )
    return load_mixture(run.data, run.stage, training.data_seed)


def make_trainer(run: Run, model, data: Mixture | MixtureStream, eval_sources) -> Trainer:
    training, embedder = run.training, embedding_model(model)
    shared = (embedder.config, run.data, training.max_length)
    if run.stage == "alignment":
        source, config = embedder.llm_tokenizer_source, embedder.config.llm_config
        llm_tokenizer = AutoTokenizer.from_pretrained(**source, config=config)
        options = {"mask_probability": training.mask_probability, "seed": training.data_seed}
        collator = AlignmentCollator(embedder.tokenizer, llm_tokenizer, *shared, **options)
    else:
        options = {name: getattr(training, name) for name in ("max_positives", "max_negatives")}
        collator = RepresentationCollator(embedder.tokenizer, *shared, **options, seed=training.data_seed)
    return TRAINERS[run.stage](model, training, data, collator, eval_sources=eval_sources)


def train(run: Run, trainer: Trainer):
    accelerator = trainer.accelerator
    if accelerator.is_main_process:
        run.begin()
    checkpoint = run.training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={None: True, "false": None}.get(checkpoint, checkpoint))

    state_dict = accelerator.get_state_dict(trainer.model_wrapped)  # whole, also where parameters are sharded
    if accelerator.is_main_process:
        save_final(accelerator.unwrap_model(trainer.model), run.final, run.model.merge_adapters, state_dict)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def main(argv: list[str]):
    is_main = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lusifer_hf").setLevel(logging.INFO if is_main else logging.ERROR)
    try:
        run, trainer = prepare(argv)
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    try:
        train(run, trainer)
    except (FloatingPointError, OSError) as error:  # a loss that is no number, a full disk
        sys.exit(f"error: {error}")
    logger.info(f"The model is in {run.final}.")


if __name__ == "__main__":
    main(sys.argv[1:])
