"""Remove rows and texts that teach nothing: empty, too short or long, damaged, in another script."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

from datasets import Features, Value

from .steps import ROW_FEATURES, column_values, step


# Control characters that are no white space, and what a decoder puts where bytes were no text.
DAMAGE = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufffd]")


def clean(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    min_query_words: int = 1,
    min_characters: int = 2,
    max_characters: int = 20_000,
    scripts: Sequence[str] | None = None,
    num_processes: int = 1,
) -> Path:
    """
    Clean data sets.

    White space at the ends is removed, and so are empty texts, positives that equal the query, negatives that equal
    a positive, and repeated positives and negatives. A row goes when its query or all its positives do.

    Args:
        inputs (sequence of `str`): Data sets, see [`~data.prepare.steps.step`].
        output (`str`): The folder to write.
        min_query_words (`int`, *optional*, defaults to 1):
            The research code asked for 4 in sets of over 1,000 rows, which would empty a set of short commands.
        min_characters, max_characters (`int`, *optional*, default to 2 and 20,000): Of every text.
        scripts (sequence of `str`, *optional*):
            Such as `["LATIN"]`, Unicode's names: at least half of the letters of the query, and of a positive, must be
            in one of them.
        num_processes (`int`, *optional*, defaults to 1)

    Returns:
        `Path`: `output`.
    """
    if not 0 <= min_characters <= max_characters:
        raise ValueError(f"min_characters={min_characters} and max_characters={max_characters} leave no text.")
    scripts = check_scripts(scripts)
    parameters = {
        "min_query_words": min_query_words,
        "min_characters": min_characters,
        "max_characters": max_characters,
        "scripts": scripts,
    }
    features = Features({**ROW_FEATURES, "reason": Value("string")})
    with step("clean", inputs, output, parameters, num_processes=num_processes) as running:
        for name in running.inputs:
            cleaned = running.map(running.read(name), partial(_clean, **parameters), features, name)
            running.keep(name, cleaned.remove_columns("reason"), column_values(cleaned, "reason"))
    return Path(output)


def check_scripts(scripts: Sequence[str] | None) -> list[str] | None:
    """The names in capitals; a `ValueError` for one that begins no Unicode name."""
    if scripts is None:
        return None
    scripts = [script.upper() for script in scripts]
    known = {script for code in range(0x3400) if (script := script_of(chr(code)))} | {"CJK", "HANGUL"}
    for script in scripts:
        if script not in known:
            raise ValueError(f"{script!r} is no script: name it as Unicode does, for instance {', '.join(_EXAMPLES)}.")
    return scripts


_EXAMPLES = ("LATIN", "CYRILLIC", "ARABIC", "DEVANAGARI", "BENGALI", "TELUGU", "HANGUL", "CJK", "HIRAGANA", "THAI")


@lru_cache(maxsize=100_000)
def script_of(character: str) -> str | None:
    """The script of a letter, the first word of its Unicode name; None for what is no letter."""
    return unicodedata.name(character, " ").split(" ")[0] or None if character.isalpha() else None


def _clean(columns: dict[str, list], scripts: list[str] | None, **limits: int) -> dict[str, list]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for row in rows:
        row["reason"] = _clean_row(row, scripts, **limits)
    return {name: [row[name] for row in rows] for name in [*columns, "reason"]}


def _clean_row(row: dict, scripts: list[str] | None, min_query_words: int, **lengths: int) -> str | None:
    """Clean the texts of a row in place; returns why the row goes."""
    row["query"] = query = (row["query"] or "").strip()
    if reason := _fault(query, scripts, **lengths) or ("too short" if len(query.split()) < min_query_words else None):
        return f"{reason} query"
    fault = None if row["positive"] else "no"
    kept: dict[str, list[str]] = {}
    for field, others in (("positive", [query]), ("negative", [query, *row["positive"]])):
        texts = [text.strip() for text in row[field]]
        seen = {_folded(text) for text in others}
        indices = []
        for index, text in enumerate(texts):
            reason = _fault(text, scripts if field == "positive" else None, **lengths)
            if reason is None and _folded(text) in seen:
                reason = "identical"
            if reason is None:
                seen.add(_folded(text))
                indices.append(index)
            elif field == "positive":
                fault = fault or reason
        kept[field] = [texts[index] for index in indices]
        if len(row[f"{field}_id"]) == len(texts):
            kept[f"{field}_id"] = [row[f"{field}_id"][index] for index in indices]
    row |= kept
    return None if row["positive"] else f"{fault} positive"


def _fault(text: str, scripts: list[str] | None, min_characters: int, max_characters: int) -> str | None:
    if not text:
        return "empty"
    if len(text) < min_characters:
        return "too short"
    if len(text) > max_characters:
        return "too long"
    if DAMAGE.search(text):
        return "damaged"
    if scripts is not None:
        letters = [script for character in text if (script := script_of(character)) is not None]
        if sum(script in scripts for script in letters) * 2 < len(letters):
            return "other script"
    return None


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
