"""Where the text of a model ends: the end tokens of its generation_config.json, read and completed for those we train.

A base model's config names the token that ends a document. Fine-tuning teaches it to end its turns with another one,
the chat template's, which our engine knows from the template; other programs know only what generation_config.json says
and would let the model talk on.
"""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infir2.checkpoint.model_source import ModelSource

GENERATION = "generation_config.json"


def end_ids(source: "ModelSource") -> tuple[int, ...]:
    """End tokens that generation_config.json adds to those of config.json."""
    found = _table(source).get("eos_token_id") or []
    return tuple(token for token in ([found] if isinstance(found, int) else found) if isinstance(token, int))


def with_end_tokens(source: "ModelSource") -> "ModelSource":
    """A checkpoint of a training run, its generation_config.json naming every token at which training let a text end;
    any other source as it is."""
    from infir2.data.chat import ChatTokenizer, choose_template
    from infir2.data.tokenizer import load_tokenizer

    trained = source.meta.get("config")
    if not trained or source.tokenizer is None:
        return source
    tokenizer = load_tokenizer(source.tokenizer)
    ends = [*source.architecture.eos_token_ids, *end_ids(source), tokenizer.eos_token_id]
    if "chat_template" in trained.get("data", {}):
        ends.append(ChatTokenizer(tokenizer, choose_template(tokenizer, "auto")).end_of_turn())
    known = sorted({token for token in ends if token is not None})
    if not known:
        return source
    # Without the mark by which transformers takes the file for a copy of config.json, whose end tokens then win.
    table = {key: value for key, value in _table(source).items() if key != "_from_model_config"}
    text = json.dumps({**table, "eos_token_id": known if len(known) > 1 else known[0]}, indent=2) + "\n"
    return replace(source, texts={**source.texts, GENERATION: text})


def _table(source: "ModelSource") -> dict[str, Any]:
    """generation_config.json; nothing where it cannot be read."""
    try:
        table = json.loads(source.texts.get(GENERATION, "{}"))
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}
