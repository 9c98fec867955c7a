"""
How much a completion has in common with reference answers, as a reward: BLEU, chrF and ROUGE, or a module of `evaluate`.

BLEUBERI (https://huggingface.co/papers/2505.11080) trains on BLEU alone: see [`TextOverlap`].
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl_ext.data.checks import is_finite_number
from trl_ext.data.paths import refuse_missing_path


Score = Callable[[str, list[str]], float]  # of a completion and its references

# Sentence BLEU whose precisions above unigrams have one added to count and total (Lin and Och, 2004)
BLEU = {"smooth_method": "add-k", "smooth_value": 1, "effective_order": True}


def _sacrebleu(metric: str, options: dict[str, Any]) -> Score:
    metrics = importlib.import_module("sacrebleu.metrics")
    scorer = metrics.BLEU(**{**BLEU, **options}) if metric == "bleu" else metrics.CHRF(**options)
    # Rounding leaves 100.00000000000004 of equal texts
    return lambda text, references: min(scorer.sentence_score(text, references).score / 100, 1.0)


def _rouge(metric: str, options: dict[str, Any]) -> Score:
    scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer([metric], **options)
    return lambda text, references: float(scorer.score_multi(references, text)[metric].fmeasure)


LIBRARIES = {"bleu": "sacrebleu", "chrf": "sacrebleu"} | dict.fromkeys(
    ("rouge1", "rouge2", "rougeL", "rougeLsum"), "rouge_score"
)


@dataclass
class TextOverlap:
    """
    A reward function: the overlap of each completion with the reference answers of its row, in [0, 1].

    Wherever `reward_funcs` are given: to [`OnlineDPOTrainer`], [`DPOTrainer`], [`score_preferences`], and on the command line or in
    YAML as `trl_ext.data.overlap:bleu` (or `chrf`, `rouge1`, `rouge2`, `rougeL`, `rougeLsum`).

    A completion without any text has the reward 0. Of messages the text of the last one is read. Online, a row without a
    reference (`None`, an empty text or list) has no opinion; [`score_preferences`] refuses it.

    Args:
        metric (`str`, *optional*, defaults to `"bleu"`):
            `"bleu"`: BLEU of the single text with one added to the counts of n-grams above unigrams, by sacrebleu; `"chrf"`, by
            sacrebleu; `"rouge1"`, `"rouge2"`, `"rougeL"` or `"rougeLsum"`: the F-measure, by rouge_score. These need no network.
            Anything else is a module of `evaluate`: its name on the hub, as `"evaluate-metric/bleu"`, or the path of its folder
            or file, computed for one completion at a time.
        column (`str`, *optional*, defaults to `"reference"`):
            Column with the reference answers of a row: a text, a list of texts, or messages.
        combine (`str`, *optional*):
            What becomes of several references: `"max"` or `"mean"` over what each would give alone. By default as the metric has it:
            BLEU looks for n-grams in all of them, chrF and ROUGE take the best.
        options (`dict[str, Any]`, *optional*):
            Further arguments: of sacrebleu's `BLEU` or `CHRF`, as `{"lowercase": True}`; of `RougeScorer`, as `{"use_stemmer": True}`;
            or of the `compute` of a module of `evaluate`, as `{"smooth": True}`.
        result (`str`, *optional*):
            Which number of a module of `evaluate` is the reward. By default the one of the module's own name, one called `"score"`, or
            the only one.

    Raises:
        `ValueError`: For another `combine`, a metric that is not there, options that it does not have, and when it is called: for rows
            without the column, references that are no text, and a module that gives no number.
        `ImportError`: Where the library of the metric is not installed.

    Example:

    ```python
    >>> from trl_ext.data import TextOverlap

    >>> reward = TextOverlap("rougeL")
    >>> reward(prompts=["Who?"], completions=["the cat sat"], reference=["the cat"])
    [0.8]
    ```
    """

    metric: str = "bleu"
    column: str = "reference"
    combine: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    result: str | None = None

    def __post_init__(self):
        if self.combine not in (None, "max", "mean"):
            raise ValueError(f"`combine={self.combine!r}` is none of 'max', 'mean', None.")
        library = LIBRARIES.get(self.metric, "evaluate")
        if library != "evaluate" and self.result is not None:
            raise ValueError(
                f"`result={self.result!r}` is of modules of `evaluate`; {self.metric!r} gives one number."
            )
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise ImportError(
                f"The metric {self.metric!r} needs {library}, which is not installed: pip install 'trl-ext[text-rewards]'"
            ) from error
        self.columns = (self.column,)
        self.__name__ = self.metric.rstrip("/").split("/")[-1]  # in metrics
        self._origin = f"{library} {importlib.metadata.version(library)}"
        try:
            if library == "evaluate":
                self._score = self._module()
            else:
                self._score = (_rouge if library == "rouge_score" else _sacrebleu)(self.metric, self.options)
        except TypeError as error:
            raise ValueError(f"`options={self.options!r}` cannot be used with {self.metric!r}: {error}") from error

    def __reduce__(self):
        # Results are kept by this: what the metric is, and by which library or file it is computed
        given = (self.metric, self.column, self.combine, self.options, self.result)
        return type(self), given, {"_origin": self._origin}

    def _module(self) -> Score:
        """The function of a module of `evaluate`."""
        refuse_missing_path(self.metric, "module of `evaluate`")
        try:
            module = importlib.import_module("evaluate").load(self.metric, keep_in_memory=True)
        except Exception as error:  # the hub, files and modules have each their own
            raise ValueError(
                f"The module {self.metric!r} of `evaluate` cannot be loaded: {error} Give a name on the hub, or the path of its "
                f"folder or file. {sorted(LIBRARIES)} need neither."
            ) from error
        self._origin += f" {type(module).__module__}"  # which has a hash of its files
        return functools.partial(self._computed, module)

    def _computed(self, module: Any, text: str, references: list[str]) -> float:
        one = references[0] if len(references) == 1 else references
        answer = module.compute(predictions=[text], references=[one], **self.options)
        names = [self.result] if self.result else [module.name, "score", *(answer if len(answer) == 1 else [])]
        value = next((answer[name] for name in names if name in answer), None)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if hasattr(value, "item"):
            value = value.item()
        if not is_finite_number(value):
            raise ValueError(
                f"The module {self.metric!r} gives {answer!r}; expected one finite number under one of {names}. Name it by `result`."
            )
        return float(value)

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """The reward of each completion; `None` where its row has no reference."""
        if self.column not in columns:
            raise ValueError(
                f"The reward {self.metric!r} compares completions with the column {self.column!r}, which is not there."
            )
        return [
            self._reward(_text(completion), _references(given))
            for completion, given in zip(completions, columns[self.column], strict=True)
        ]

    def _reward(self, text: str, references: list[str]) -> float | None:
        if not references:
            return None
        if not text.strip():
            return 0.0
        if self.combine is None:
            return self._score(text, references)
        values = [self._score(text, [reference]) for reference in references]
        return max(values) if self.combine == "max" else sum(values) / len(values)


def _text(value: Any) -> str:
    """Text, or that of the last message."""
    content = value[-1].get("content") if isinstance(value, list) and value else value
    return content if isinstance(content, str) else ""


def _references(given: Any) -> list[str]:
    """The reference answers of a row; none where it has none."""
    several = given if isinstance(given, list) and not any(isinstance(each, dict) for each in given) else [given]
    texts = [_text(each) for each in several if each not in (None, "", [])]
    if not all(text.strip() for text in texts):
        raise ValueError(f"The reference {given!r} holds no text; expected a text, a list of texts, or messages.")
    return texts


def __getattr__(name: str) -> TextOverlap:
    """`trl_ext.data.overlap:bleu` and the others, where a reward function is named."""
    if name not in LIBRARIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return TextOverlap(name)
