"""The recipe: about sixty typed, frozen, strict keys in sections that each have one owner.

`recipe_file.py` reads a YAML file into these models and says where a value stands. A noun takes its own section
(`train: Train`), never the whole `Recipe`. The docstring below a field is its help, in the JSON Schema as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from lora_tune.recipe_values import (
    Amount,
    AutoCount,
    AutoRate,
    Checkpointing,
    Count,
    Duration,
    HoldOut,
    Positive,
    Share,
    Strings,
    Targets,
    Templates,
    Text,
    conflict,
    refuse,
    strings,
)

EMBEDDING_NAMES = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")


class Section(BaseModel):
    """Frozen, strict, no unknown keys; the docstring below a field is its help."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


def _sources(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value:
        return tuple(value)
    raise refuse("must be a list with at least one source", "write a line `- source: <file or data set>` below data:")


class Base(Section):
    """The base model that stays frozen."""

    name: Text
    """Hub id, local folder, or `builtin:quickstart`."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; the commit is recorded either way."""
    quantize: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the frozen weights are held: 4-bit NormalFloat, 4-bit float, 8-bit integer, or as stored."""
    double_quant: bool = True
    """Quantize the 4-bit scales as well (0.37 bit less per parameter)."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of activations; auto: bfloat16 where supported, else float16 with loss scaling and float32 adapters."""
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = "auto"
    """varlen: packed rows train document by document, without a mask; auto: that on a GPU in 16 bit, else sdpa."""
    embeddings: Literal["device", "cpu"] = "device"
    """Where the input embedding lies; cpu: 1 GiB less of a GPU for an 8B base, one wait more in a forward pass."""
    chat_template: Text | None = None
    """A Jinja file instead of the base's own chat template."""


class DataSource(Section):
    """One source of training rows."""

    source: Text
    """A file, folder or glob (.json .jsonl .csv .tsv .parquet .txt, also .gz), or a data set on the hub."""
    config: Text | None = None
    """Configuration (subset) of a hub data set."""
    split: Text = "train"
    """Split of a hub data set."""
    revision: Text | None = None
    """Revision of a hub data set."""
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text", "table", "sni"] = "auto"
    """What a row looks like; auto says what it took and why."""
    columns: dict[str, str] | None = None
    """Names of the columns to read: {field of the format: column of the file}; `table` needs prompt and completion."""
    weight: Positive = 1.0
    """Share of sampling: 2 means that an epoch shows each row twice, 0.5 that it shows half of them."""
    max_rows: Count | None = None
    """Take at most this many rows, chosen by the seed."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """A malformed or answer-less row ends the run before the base is loaded, or is dropped and counted."""
    pack: bool = True
    """Rows of this source may share a packed sequence."""
    task: Text | None = None
    """Name of the task, or of the cluster of tasks, that this source belongs to, such as nli."""
    prompts: Text | None = None
    """A file of prompt templates (promptsource YAML, `input ||| target`) that make the rows; format stays at auto."""
    templates: Templates = "all"
    """Which templates of `prompts` are used; each row gets one of them, chosen by the seed."""
    shots: Annotated[int, Field(ge=0, le=64)] = 0
    """Solved examples before the question: other training rows (prompts), or positive examples (sni)."""
    options: bool = False
    """End the question with `OPTIONS:` and the answer choices, where the template does not list them itself."""
    invert: Share = "0%"
    """Share of the training rows that are turned round: the answer is given and the input is asked for."""

    @model_validator(mode="after")
    def _prompts_fit(self) -> DataSource:
        found = []
        if self.prompts and self.format != "auto":
            found.append(("format", "cannot be chosen beside prompts, which read the columns as they are", "remove it"))
        asked = {"templates": self.templates != "all", "options": self.options, "invert": float(self.invert[:-1]) > 0}
        asked["shots"] = self.shots > 0 and self.format != "sni"
        for key in [key for key, value in asked.items() if value and not self.prompts]:
            found.append((key, "changes nothing without prompts", "name a file of templates: prompts, or remove it"))
        if found:
            raise conflict(found)
        return self

    @model_validator(mode="after")
    def _table_needs_columns(self) -> DataSource:
        if self.format == "table" and not {"prompt", "completion"} <= set(self.columns or {}):
            fix = "add columns: {prompt: <column of the file>, completion: <column of the file>}"
            raise conflict([("format", "table needs to know which columns are prompt and completion", fix)])
        return self


class Mixing(Section):
    """How large a part of an epoch each source is, before its own `weight`."""

    cap: Count | None = None
    """Examples-proportional mixing: a source counts as at most this many rows (3,000 in FLAN)."""
    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Flatten the shares: they go with rows ** (1 / temperature); 1 keeps them, a large one makes them equal."""


class Lora(Section):
    """The adapter that is trained."""

    method: Literal["lora", "rslora", "dora", "pissa", "olora", "loftq", "eva"] = "lora"
    """Adapter method; all are saved as plain LoRA or DoRA (pissa and olora with twice the rank and alpha)."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank r of the update B·A."""
    alpha: Positive = 32.0
    """Scale: the update is multiplied by alpha / rank (alpha / sqrt(rank) for rslora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before A; above 0 it costs about 60 % more saved activations."""
    targets: Targets = "all-linear"
    """Names of the linear layers that get an adapter, or all-linear."""
    modules_to_save: Strings = ()
    """Modules trained and saved in full (the head, the embeddings)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = {}
    """Another rank for some modules: {name: rank}."""
    alpha_pattern: dict[str, Positive] = {}
    """Another alpha for some modules: {name: alpha}."""
    new_tokens: Strings = ()
    """Tokens added to the tokenizer; only their embeddings are trained."""
    start_from: Text | None = None
    """Continue this adapter folder instead of starting from zero."""
    plus_ratio: Positive | None = None
    """LoRA+: learning rate of B over that of A (16 in the paper)."""


class Train(Section):
    """How the adapter is trained."""

    epochs: Positive = 1.0
    """Passes over the training rows."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    budget: Duration | None = None
    """Train for this long (45s, 90m, 1h30m) instead of `epochs`: the learning rate ends at the deadline."""
    learning_rate: AutoRate = "auto"
    """Peak learning rate; auto: 2e-4 at a width (hidden size) of 4,096, and in inverse proportion to it."""
    schedule: Literal["cosine", "linear", "constant", "polynomial", "inverse_sqrt"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Amount = "3%"
    """Optimizer steps of warm-up: a number or a share."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Clip the gradient to this norm."""
    optimizer: Literal[
        "auto", "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion_8bit", "sgd"
    ] = "auto"
    """auto: adamw; on a GPU adamw_8bit where nothing fits without it."""
    batch_size: Count = 2
    """Sequences per optimizer step (packed rows where packing is on); few rows are learned best in small steps."""
    micro_batch_size: AutoCount = "auto"
    """Sequences per forward pass; accumulation is batch_size / micro_batch_size. auto: the fastest that fits."""
    max_length: Annotated[int, Field(ge=2, lt=2**31)] = 2048
    """Tokens per sequence."""
    too_long: Literal["truncate", "drop", "split"] = "truncate"
    """What happens to a longer row; rows of format `text` are always split."""
    packing: bool = True
    """Put several rows into one sequence, isolated from each other."""
    gradient_checkpointing: Checkpointing = "auto"
    """Recompute activations in the backward pass: all layers, none, or the first N; auto: as many as memory needs."""
    offload: Literal["auto", "checkpoints", "none"] = "auto"
    """checkpoints: inputs of recomputed layers wait in the machine's memory; auto: where nothing else fits (GPU)."""
    kernels: Literal["off", "auto"] = "auto"
    """auto: adapted layers compute fused where they can, faster and in less memory; numbers differ by rounding."""
    compile: Literal["off", "layers"] = "off"
    """layers: torch.compile fuses each decoder layer, instead of `kernels`; minutes before the first step."""
    neftune_alpha: Positive | None = None
    """Noise on the embeddings (NEFTune; 5 in the paper)."""
    save_every: Count | None = None
    """Optimizer steps between checkpoints; without it, one at the end of every epoch."""
    keep_checkpoints: Count = 2
    """How many checkpoints stay on disk."""
    max_skipped_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Leave out this many steps whose loss or gradient is not finite before the training stops."""


MetricName = Literal[
    "loss", "perplexity", "exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "accuracy",
    "accuracy_norm", "numeric_match", "json_valid", "json_schema", "tool_match", "length_error", "stop_rate",
    "repetition",
]  # fmt: skip


class Eval(Section):
    """What shows that it learned."""

    hold_out: HoldOut = "2%"
    """Rows kept out of training: a share, a number, or a data file of its own."""
    hold_out_tasks: Strings = ()
    """Tasks (data[].task) kept out of training as a whole and evaluated zero-shot with all of their templates."""
    metrics: Annotated[tuple[MetricName, ...], BeforeValidator(strings)] | None = None
    """Scores of base and adapter on the held-out rows; without it: loss."""
    every: Count | None = None
    """Optimizer steps between evaluations; without it, only at the end."""
    max_rows: Count | None = None
    """Evaluate at most this many held-out rows; of a held-out task, as many rows of each source."""
    samples: Annotated[int, Field(ge=0)] = 5
    """Answers of base and adapter shown and stored."""
    keep_best: bool = False
    """Keep the weights with the lowest held-out loss instead of the last ones."""
    stop_after: Count | None = None
    """Stop when the held-out loss has not improved in this many evaluations."""


class Hardware(Section):
    """On how many cards, and how the work is shared between them."""

    processes: AutoCount = "auto"
    """Processes on each node, one a card; auto: every visible GPU that divides `train.batch_size`, 1 on a CPU."""
    nodes: Count = 1
    """Machines; each starts the same command, and finds the others by MASTER_ADDR, MASTER_PORT and NODE_RANK."""
    strategy: Literal["auto", "single", "ddp", "fsdp2", "zero3"] = "auto"
    """auto: ddp (rows are shared) where one card holds the base, else fsdp2 (the base is divided as well)."""
    timeout: Duration = "10m"
    """A process that does not answer for so long ends the run, and is named."""


class Limits(Section):
    """Above a limit the run stops before training (exit 3)."""

    dropped_rows: Amount = "1%"
    """Rows that cannot be trained on."""
    lost_tokens: Amount = "1%"
    """Tokens cut off by `max_length`."""
    lost_end_tokens: Amount = "1%"
    """Rows whose last end-of-turn token was cut off, so that the model does not learn to stop."""
    duplicates: Amount | None = None
    """Exact duplicates; without it they are counted and warned of."""


class Recipe(Section):
    """One run: a base, data, an adapter, how to train and evaluate it, and where it goes."""

    base: Base
    """The base model that stays frozen."""
    data: Annotated[tuple[DataSource, ...], BeforeValidator(_sources), Field(json_schema_extra={"minItems": 1})]
    """Where the training rows come from."""
    mixing: Mixing = Mixing()
    """How large a part of an epoch each source is, before its own `weight`."""
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which turns are trained: all answers, the last answer, or every token."""
    lora: Lora = Lora()
    """The adapter that is trained."""
    train: Train = Train()
    """How the adapter is trained."""
    eval: Eval = Eval()
    """What shows that it learned."""
    limits: Limits = Limits()
    """Above a limit the run stops before training (exit 3)."""
    hardware: Hardware = Hardware()
    """On how many cards, and how the work is shared between them."""
    output: Text
    """Folder of the adapter (the run's folder); relative to the working folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything random."""
    track: Annotated[tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...], BeforeValidator(strings)] = ()
    """Experiment trackers, all off by default."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if found := [*self._evaluation_conflicts(), *self._task_conflicts(), *self._training_conflicts()]:
            raise conflict(found)
        return self

    def _evaluation_conflicts(self) -> Iterator[tuple[str, str, str]]:
        evaluation = self.eval
        asked = {"metrics": evaluation.metrics, "every": evaluation.every, "stop_after": evaluation.stop_after}
        for key in [key for key, value in asked.items() if value and not self.holds_out]:
            reason = f"holds no row out, but eval.{key} needs held-out rows"
            yield "eval.hold_out", reason, f"write a share such as 2%, or remove eval.{key}"
        if evaluation.every is None:
            for key, value in {"keep_best": evaluation.keep_best, "stop_after": evaluation.stop_after}.items():
                if value:
                    yield f"eval.{key}", "needs evaluations during training", "set eval.every"

    def _task_conflicts(self) -> Iterator[tuple[str, str, str]]:
        tasks = sorted({source.task for source in self.data if source.task})
        apart = self.eval.hold_out_tasks
        for name in [name for name in apart if name not in tasks]:
            near = get_close_matches(name, tasks, n=1, cutoff=0.6)
            fix = f"did you mean `{near[0]}`?" if near else "set data[].task of its sources"
            if tasks and not near:
                fix = f"the tasks here are {', '.join(tasks)}"
            yield "eval.hold_out_tasks", f"no source has the task, got {name!r}", fix
        held_out = [source.task in apart for source in self.data]
        if all(held_out):
            yield "eval.hold_out_tasks", "holds every source out: nothing is left to train on", "leave a task to train"
        if apart and self.eval.keep_best and not self._holds_rows_out:
            reason = "would choose the weights by the tasks that are held out"
            yield "eval.keep_best", reason, "hold rows of the trained tasks out as well: eval.hold_out"
        for number, source in enumerate(self.data):
            for key, asked in (("invert", source.invert != "0%"), ("shots", source.shots > 0 and source.prompts)):
                if held_out[number] and asked:
                    yield (
                        f"data.{number}.{key}",
                        "changes nothing: the task is held out, and asked zero-shot",
                        "remove it",
                    )

    def _training_conflicts(self) -> Iterator[tuple[str, str, str]]:
        micro, batch = self.train.micro_batch_size, self.train.batch_size
        if micro != "auto" and batch % micro:
            reason = f"must divide train.batch_size {batch} without a rest"
            yield "train.micro_batch_size", reason, "write auto, or a divisor"
        yield from self._memory_conflicts()
        yield from self._budget_conflicts()
        if self.lora.plus_ratio and self.train.optimizer in ("adafactor", "sgd", "lion_8bit"):
            yield "lora.plus_ratio", "needs an AdamW optimizer", "set train.optimizer: adamw, or remove lora.plus_ratio"

    def _memory_conflicts(self) -> Iterator[tuple[str, str, str]]:
        train, lora = self.train, self.lora
        if train.offload == "checkpoints" and train.gradient_checkpointing in ("none", 0):
            fix = "set train.gradient_checkpointing to auto, all or a number of layers, or remove it"
            yield "train.offload", "moves inputs of layers that are recomputed, and none is", fix
        if train.offload == "checkpoints" and train.compile == "layers":
            yield "train.offload", "does not work with train.compile: layers", "remove one of the two"
        if self.base.embeddings == "cpu":
            named = [*lora.modules_to_save, *(lora.targets if isinstance(lora.targets, tuple) else ())]
            trained = [name for name in named if name.rpartition(".")[2] in EMBEDDING_NAMES]
            for key, what in {"lora.new_tokens": lora.new_tokens, "an adapter of the embedding": trained}.items():
                if what:
                    yield "base.embeddings", f"keeps the embedding frozen, but {key} trains it", "set it to device"

    def _budget_conflicts(self) -> Iterator[tuple[str, str, str]]:
        asked = {"epochs": self.train.epochs != 1.0, "max_steps": self.train.max_steps is not None}
        for key in [key for key, given in asked.items() if given and self.train.budget]:
            yield "train.budget", f"says how long to train, and so does train.{key}", "remove one of the two"

    @property
    def holds_out(self) -> bool:
        """Whether rows are kept out of training."""
        return bool(self.eval.hold_out_tasks) or self._holds_rows_out

    @property
    def _holds_rows_out(self) -> bool:
        return not re.fullmatch(r"0+(\.0+)? ?%?", str(self.eval.hold_out))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics in force: those asked for, else `loss` where rows are held out."""
        if self.eval.metrics is not None:
            return self.eval.metrics
        return ("loss",) if self.holds_out else ()


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model behind a field that is a section or a list of sections; None for a plain value."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
