"""
The benchmark of the LUSIFER paper as `mteb.Benchmark` objects: multilingual, cross-lingual, and a quick subset.

`TASKS` lists the tasks of each language. A task stands in a benchmark once, with the subsets of the languages that
list it. Which subsets those are:

- multilingual: those that hold the language alone (mteb's `exclusive_language_filter`): of STS17 for Spanish `es-es`,
  not `es-en`; where a task has none (STS17 for French, IndicCrosslingualSTS), those that pair it with another;
- cross-lingual: those that pair two languages, of all languages, or with a selection those of two selected ones.

54 of the 180 names have a successor in mteb, `mteb.get_task(name).superseded_by`; the paper's tasks are kept.
"""

import difflib
from collections.abc import Sequence
from functools import cache

import mteb
from mteb.abstasks import AbsTask
from mteb.benchmarks.get_benchmark import _build_registry

from .results import LANGUAGES


# The 14 languages of the paper; further ones, that only the research code has, are in `LANGUAGE_CODES`.
PAPER_LANGUAGES = ("en", "es", "ru", "fr", "vi", "fa", "id", "ar", "fi", "ko", "hi", "bn", "te", "sw")
LANGUAGE_CODES = {
    language: tuple(code for code, found in LANGUAGES.items() if found == language) for language in LANGUAGES.values()
}

TASKS = {
    "en": """
        AmazonCounterfactualClassification AmazonPolarityClassification AmazonReviewsClassification
        Banking77Classification EmotionClassification ImdbClassification MassiveIntentClassification
        MassiveScenarioClassification MTOPDomainClassification MTOPIntentClassification
        ToxicConversationsClassification TweetSentimentExtractionClassification ArxivClusteringP2P
        ArxivClusteringS2S BiorxivClusteringP2P BiorxivClusteringS2S MedrxivClusteringP2P MedrxivClusteringS2S
        RedditClustering RedditClusteringP2P StackExchangeClustering StackExchangeClusteringP2P
        TwentyNewsgroupsClustering SprintDuplicateQuestions TwitterSemEval2015 TwitterURLCorpus
        AskUbuntuDupQuestions MindSmallReranking SciDocsRR StackOverflowDupQuestions ArguAna ClimateFEVER
        CQADupstackTexRetrieval DBPedia FEVER FiQA2018 HotpotQA MSMARCO NFCorpus NQ QuoraRetrieval SCIDOCS SciFact
        Touche2020 TRECCOVID STS12 STS13 STS14 STS15 STS16 STS17 STS22 BIOSSES SICK-R STSBenchmark SummEval
    """,
    "es": """
        AmazonReviewsClassification MassiveIntentClassification MassiveScenarioClassification
        MTOPIntentClassification MultilingualSentimentClassification TweetSentimentClassification
        SpanishNewsClassification SpanishNewsClusteringP2P MLSUMClusteringP2P.v2 MLSUMClusteringS2S.v2
        SIB200ClusteringS2S MultiEURLEXMultilabelClassification PawsXPairClassification XNLI BelebeleRetrieval
        MintakaRetrieval XQuADRetrieval STS17 STS22 STSBenchmarkMultilingualSTS
    """,
    "ru": """
        GeoreviewClassification GeoreviewClusteringP2P HeadlineClassification InappropriatenessClassification
        KinopoiskClassification MassiveIntentClassification MassiveScenarioClassification RiaNewsRetrieval
        RuBQRetrieval RuReviewsClassification RuSciBenchGRNTIClassification RuSciBenchGRNTIClusteringP2P
        RuSciBenchOECDClassification RuSciBenchOECDClusteringP2P TERRa RuSTSBenchmarkSTS STS22
    """,
    "fr": """
        AmazonReviewsClassification MTOPIntentClassification MassiveIntentClassification
        MassiveScenarioClassification MasakhaNEWSClusteringP2P TweetSentimentClassification SIB200Classification
        FrenchBookReviews MasakhaNEWSClusteringS2S MLSUMClusteringP2P.v2 MLSUMClusteringS2S.v2
        AlloProfClusteringP2P.v2 AlloProfClusteringS2S.v2 HALClusteringS2S.v2 SIB200ClusteringS2S
        MultiEURLEXMultilabelClassification OpusparcusPC PawsXPairClassification RTE3 XNLI AlloprofReranking
        SyntecReranking AlloprofRetrieval FQuADRetrieval BelebeleRetrieval MintakaRetrieval PublicHealthQA STS17
        SICKFr STS22.v2 STSBenchmarkMultilingualSTS SummEvalFr
    """,
    "vi": """
        MassiveIntentClassification MassiveScenarioClassification MultilingualSentimentClassification
        SIB200Classification VieStudentFeedbackClassification SIB200ClusteringS2S XNLI BelebeleRetrieval
        MLQARetrieval PublicHealthQA XQuADRetrieval VieQuADRetrieval
    """,
    "fa": """
        MassiveScenarioClassification MassiveIntentClassification MultilingualSentimentClassification FarsTail
        WikipediaRerankingMultilingual WikipediaRetrievalMultilingual
    """,
    "id": """
        IndonesianMongabayConservationClassification MassiveIntentClassification MassiveScenarioClassification
        SIB200Classification SIB200ClusteringS2S indonli BelebeleRetrieval SemRel24STS
    """,
    "ar": """
        TweetEmotionClassification ArEntail XNLI MintakaRetrieval MLQARetrieval STS17 STS22.v2
    """,
    "fi": """
        FinToxicityClassification MassiveIntentClassification MassiveScenarioClassification
        MultilingualSentimentClassification SIB200Classification OpusparcusPC WikipediaRerankingMultilingual
        BelebeleRetrieval WikipediaRetrievalMultilingual FinParaSTS
    """,
    "ko": """
        MassiveIntentClassification MassiveScenarioClassification KLUE-TC KorSarcasmClassification
        SIB200Classification SIB200ClusteringS2S KorHateSpeechMLClassification PawsXPairClassification
        Ko-StrategyQA BelebeleRetrieval PublicHealthQA KLUE-STS KorSTS STS17
    """,
    "hi": """
        MTOPIntentClassification SentimentAnalysisHindi MassiveIntentClassification MassiveScenarioClassification
        SIB200Classification TweetSentimentClassification IndicReviewsClusteringP2P SIB200ClusteringS2S XNLI
        WikipediaRerankingMultilingual BelebeleRetrieval MintakaRetrieval MLQARetrieval
        WikipediaRetrievalMultilingual XQuADRetrieval IndicCrosslingualSTS SemRel24STS
    """,
    "bn": """
        BengaliDocumentClassification BengaliHateSpeechClassification MassiveIntentClassification
        MassiveScenarioClassification IndicReviewsClusteringP2P SIB200ClusteringS2S XNLIV2
        WikipediaRerankingMultilingual BelebeleRetrieval IndicQARetrieval WikipediaRetrievalMultilingual
        IndicCrosslingualSTS
    """,
    "te": """
        IndicNLPNewsClassification IndicSentimentClassification MassiveIntentClassification
        MassiveScenarioClassification SIB200Classification TeluguAndhraJyotiNewsClassification
        IndicReviewsClusteringP2P SIB200ClusteringS2S BelebeleRetrieval IndicQARetrieval IndicCrosslingualSTS
        SemRel24STS
    """,
    "sw": """
        AfriSentiClassification MasakhaNEWSClassification MassiveIntentClassification MassiveScenarioClassification
        SwahiliNewsClassification MasakhaNEWSClusteringP2P MasakhaNEWSClusteringS2S XNLI
    """,
    "de": """
        AmazonCounterfactualClassification AmazonReviewsClassification MTOPIntentClassification
        MassiveIntentClassification MassiveScenarioClassification MultilingualSentimentClassification
        TweetSentimentClassification TenKGnadClusteringP2P.v2 TenKGnadClusteringS2S.v2 BlurbsClusteringP2P.v2
        BlurbsClusteringS2S.v2 MultiEURLEXMultilabelClassification RTE3 XNLI WikipediaRerankingMultilingual
        GermanDPR GermanGovServiceRetrieval GermanQuAD-Retrieval BelebeleRetrieval MintakaRetrieval
        WikipediaRetrievalMultilingual XQuADRetrieval STS17 STS22 STSBenchmarkMultilingualSTS
    """,
    "ja": """
        AmazonCounterfactualClassification AmazonReviewsClassification WRIMEClassification
        MassiveIntentClassification MassiveScenarioClassification SIB200Classification LivedoorNewsClustering.v2
        MewsC16JaClustering SIB200ClusteringS2S PawsXPairClassification VoyageMMarcoReranking JaGovFaqsRetrieval
        JaQuADRetrieval NLPJournalAbsIntroRetrieval NLPJournalTitleAbsRetrieval BelebeleRetrieval MintakaRetrieval
        JSICK JSTS
    """,
    "th": """
        MTOPIntentClassification MassiveIntentClassification MassiveScenarioClassification
        MultilingualSentimentClassification WisesightSentimentClassification XNLI BelebeleRetrieval XQuADRetrieval
    """,
    "yo": """
        AfriSentiClassification MasakhaNEWSClassification NaijaSenti SIB200Classification MasakhaNEWSClusteringP2P
        MasakhaNEWSClusteringS2S SIB200ClusteringS2S BelebeleRetrieval
    """,
    "zh": """
        AmazonReviewsClassification MLQARetrieval IFlyTek JDReview MassiveIntentClassification
        MassiveScenarioClassification MultilingualSentiment OnlineShopping TNews Waimai CLSClusteringP2P
        CLSClusteringS2S ThuNewsClusteringP2P ThuNewsClusteringS2S Ocnli PawsXPairClassification MMarcoReranking
        T2Reranking CMedQAv2-reranking CmedqaRetrieval CovidRetrieval DuRetrieval EcomRetrieval MedicalRetrieval
        MMarcoRetrieval T2Retrieval VideoRetrieval AFQMC ATEC BQ LCQMC PAWSX STSB STS22
    """,
}
CROSS_LINGUAL = "IndicCrosslingualSTS MLQARetrieval BelebeleRetrieval STS17 STS22.v2"
# The research code's list lacks a comma between the last but two, so that it names a task that does not exist.
QUICK = """
    AmazonReviewsClassification RuReviewsClassification MultilingualSentimentClassification SIB200Classification
    BengaliDocumentClassification MedrxivClusteringS2S TERRa SIB200ClusteringS2S AskUbuntuDupQuestions
    WikipediaRerankingMultilingual ArguAna VieQuADRetrieval WikipediaRetrievalMultilingual STS22 IndicCrosslingualSTS
"""

_ABOUT = {
    "LUSIFER(multilingual)": "The tasks of the LUSIFER paper, each in the languages that it is used for.",
    "LUSIFER(cross-lingual)": "The cross-lingual tasks of the LUSIFER paper: the two texts are in two languages.",
    "LUSIFER(quick)": "A subset of LUSIFER(multilingual) of all task types, for a first look.",
}
BENCHMARKS = tuple(_ABOUT)
_CITATION = r"""
@article{man2025lusifer,
  title = {LUSIFER: Language Universal Space Integration for Enhanced Multilingual Embeddings with Large Language
    Models},
  author = {Man, Hieu and Ngo, Nghia Trung and Lai, Viet Dac and Rossi, Ryan A. and Dernoncourt, Franck and
    Nguyen, Thien Huu},
  journal = {arXiv preprint arXiv:2501.00874},
  year = {2025}
}
"""


def get_benchmark(name: str, languages: Sequence[str] | None = None) -> mteb.Benchmark:
    """
    A benchmark of the paper, with tasks that are restricted to the wanted languages.

    Args:
        name (`str`):
            `"LUSIFER(multilingual)"`, `"LUSIFER(cross-lingual)"` or `"LUSIFER(quick)"`.
        languages (sequence of `str`, *optional*):
            Keys of `LANGUAGE_CODES`. By default the 14 languages of the paper; of the cross-lingual tasks, all pairs.

    Raises:
        `ValueError`: naming the benchmark or language that does not exist, or has no task here.
    """
    _check_name("benchmark", name, BENCHMARKS)
    _check_languages(languages)
    if name == "LUSIFER(cross-lingual)":
        tasks = _cross_lingual_tasks(languages)
    else:
        names = QUICK.split() if name == "LUSIFER(quick)" else None
        tasks = _multilingual_tasks(languages or PAPER_LANGUAGES, names)
    if not tasks:
        raise ValueError(f"{name} has no task in {', '.join(languages)}.")
    return mteb.Benchmark(
        name=name,
        tasks=tasks,
        description=_ABOUT[name],
        reference="https://arxiv.org/abs/2501.00874",
        citation=_CITATION,
    )


def get_tasks(names: Sequence[str], languages: Sequence[str] | None = None) -> list[AbsTask]:
    """
    Tasks of mteb by name, a task of the benchmark in the languages that list it, another in all of its languages.

    Raises:
        `ValueError`: for a task or language that does not exist, with the nearest name, or a task without it.
    """
    _check_languages(languages)
    listed = {task.metadata.name: task for task in _multilingual_tasks(languages or list(LANGUAGE_CODES), names)}
    codes = [code for language in languages for code in LANGUAGE_CODES[language]] if languages else None
    tasks = []
    for name in names:
        try:
            tasks.append(listed.get(name) or mteb.get_task(name, languages=codes))
        except KeyError as error:  # says which name is near
            raise ValueError(f"mteb has no such task: {error.args[0].removeprefix('KeyError: ')}") from None
        except ValueError:
            raise ValueError(f"{name} has no data in {', '.join(languages)}.") from None
    return tasks


def register_benchmarks():
    """Have `mteb.get_benchmark` find the benchmarks, which it has no public way for."""
    _build_registry().update({name: get_benchmark(name) for name in BENCHMARKS})


def _multilingual_tasks(languages: Sequence[str], names: Sequence[str] | None = None) -> list[AbsTask]:
    subsets: dict[str, list[str]] = {}
    for language in languages:
        for name in TASKS[language].split():
            if names is None or name in names:
                subsets.setdefault(name, []).extend(_subsets(name, language))
    return [mteb.get_task(name, hf_subsets=wanted) for name, wanted in subsets.items()]


def _subsets(name: str, language: str) -> list[str]:
    wanted = set(LANGUAGE_CODES[language])
    codes = _subset_codes(name)
    alone = [subset for subset, found in codes.items() if found <= wanted]
    return alone or [subset for subset, found in codes.items() if found & wanted]


def _cross_lingual_tasks(languages: Sequence[str] | None) -> list[AbsTask]:
    selected = {code for language in languages or () for code in LANGUAGE_CODES[language]}
    tasks = []
    for name in CROSS_LINGUAL.split():
        subsets = [
            subset
            for subset, found in _subset_codes(name).items()
            if len(found) == 2 and (not languages or found <= selected)
        ]
        if subsets:
            tasks.append(mteb.get_task(name, hf_subsets=subsets))
    return tasks


@cache
def _subset_codes(name: str) -> dict[str, set[str]]:
    """The languages of each subset of a task."""
    subsets = mteb.get_task(name).metadata.hf_subsets_to_langscripts
    return {subset: {langscript.split("-")[0] for langscript in found} for subset, found in subsets.items()}


def _check_languages(languages: Sequence[str] | None):
    for language in languages or ():
        _check_name("language", language, tuple(LANGUAGE_CODES))


def _check_name(kind: str, name: str, known: Sequence[str]):
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}."
        raise ValueError(f"There is no {kind} {name!r}: {hint}")
