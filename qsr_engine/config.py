"""Configuration: one typed, strict model of the `"qsr"` block and of a recipe.

Two inputs end here: a DeepSpeed configuration (path or dict) with one more block, `"qsr"`
(`split_deepspeed_config`), and a recipe, one YAML file with the blocks of `Recipe` (`qsr_engine.recipe` reads it).

Every mistake is a `ConfigError` that names the key's path, what was found and what to write instead. Nothing here
imports torch or starts a process group, so a bad configuration is refused before any training starts.

`step` always counts optimizer steps.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says what was wrong, what was found and what to write."""


class StrictModel(BaseModel):
    """Unknown keys and wrong types are errors, and a checked value does not change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LearningRateConfig(StrictModel):
    """The learning rate as a function of the step (the formulas are in `schedule.learning_rate`)."""

    schedule: Literal["cosine", "linear", "step", "cosine_step", "constant"]
    peak: Positive
    min: NonNegative = 0.0
    warmup_steps: Count = 0
    decay_steps: list[PositiveInt] = []  # schedule "step": optimizer steps at which lr is multiplied by factor
    factor: Positive = 0.1  # schedule "step"
    base: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0  # schedule "cosine_step": lr is a power of base

    @model_validator(mode="after")
    def _consistent(self) -> LearningRateConfig:
        if self.min > self.peak:
            raise ValueError(f"min is {self.min} and peak is {self.peak}; write a min that is not above the peak")
        if self.factor > 1:
            raise ValueError(f"factor is {self.factor}; write a factor of at most 1, so that the learning rate decays")
        if self.decay_steps != sorted(set(self.decay_steps)):
            raise ValueError(f"decay_steps is {self.decay_steps}; write strictly increasing steps")
        if self.decay_steps and self.schedule != "step":
            raise ValueError(f"decay_steps is read by the schedule 'step' only, and schedule is {self.schedule!r}")
        return self


class AveragingConfig(StrictModel):
    """How parameters are averaged at a boundary."""

    # Size of a bucket in MB (1e6 bytes), at least 100 bytes; None: the default of the backend.
    bucket_mb: Annotated[float, Field(ge=1e-4, allow_inf_nan=False)] | None = None
    shared_memory: bool = True  # on CPUs: average in shared memory where all ranks of a group are on one host
    # Inside every host first, then between hosts. auto: where ranks on CPUs share memory on several hosts with the same
    # number of them each; true: also by collectives, on GPUs or without shared memory.
    two_level: Literal["auto", True, False] = "auto"
    wire_dtype: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    overlap: Literal["none", "next_forward", "delayed"] = "none"
    delay_steps: PositiveInt | None = None  # overlap "delayed": steps between the snapshot and its average
    cuda_graph: bool = False
    state: list[str] = []  # names of optimizer state that is averaged with the parameters, such as exp_avg
    buffers: Literal["average", "local"] = "average"  # floating-point buffers, such as batch-norm statistics

    @model_validator(mode="after")
    def _consistent(self) -> AveragingConfig:
        if self.overlap == "delayed" and self.delay_steps is None:
            raise ValueError("delay_steps is missing, and overlap 'delayed' needs it; write for example 1")
        if self.overlap != "delayed" and self.delay_steps is not None:
            raise ValueError(
                f"delay_steps is {self.delay_steps}, and overlap {self.overlap!r} does not read it; write null, or the "
                "overlap 'delayed'"
            )
        if self.overlap == "delayed" and self.wire_dtype != "fp32":
            raise ValueError(
                f"wire_dtype is {self.wire_dtype!r} and overlap is 'delayed': after a delayed averaging no two workers "
                "hold the same parameters, from which differences could be sent; write wire_dtype 'fp32', or the "
                "overlap 'next_forward'"
            )
        if self.overlap == "delayed" and self.state:
            raise ValueError(
                f"state is {self.state!r} and overlap is 'delayed': the state would be averaged steps before the "
                "parameters that it belongs to; write state [], or the overlap 'none' or 'next_forward'"
            )
        if self.cuda_graph and (self.overlap != "none" or self.wire_dtype != "fp32"):
            raise ValueError(
                f"cuda_graph is true, overlap is {self.overlap!r} and wire_dtype is {self.wire_dtype!r}; a graph holds "
                "the plain averaging only, so write overlap 'none' and wire_dtype 'fp32', or cuda_graph false"
            )
        if self.two_level is True and (self.cuda_graph or self.overlap == "delayed" or self.wire_dtype != "fp32"):
            raise ValueError(
                f"two_level is true, wire_dtype is {self.wire_dtype!r}, overlap is {self.overlap!r} and cuda_graph is "
                f"{str(self.cuda_graph).lower()}; the two levels average the parameters themselves, and at once, "
                "so write wire_dtype 'fp32', overlap 'none' or 'next_forward' and cuda_graph false, or two_level 'auto'"
            )
        return self


class OuterConfig(StrictModel):
    """The outer optimizer: SGD on the workers' mean movement (see `averaging.outer`)."""

    lr: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False

    @property
    def is_plain_average(self) -> bool:
        """Whether it gives the average itself."""
        return self.lr == 1 and self.momentum == 0

    @model_validator(mode="after")
    def _consistent(self) -> OuterConfig:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is true and momentum is 0; write a momentum such as 0.9, or nesterov false")
        return self


class FaultsConfig(StrictModel):
    """What a run does when something goes wrong."""

    # After so many seconds without a sign of life, or without progress while others wait for it, a rank is lost, and
    # every other rank ends with an error that names it; None: never.
    timeout_seconds: Annotated[float, Field(ge=1, le=604_800, allow_inf_nan=False)] | None = 600.0
    # A worker whose parameters, or buffers that are averaged, are not finite at a boundary ends the run; or it is left
    # out of this average, and gets that of the others with the mean of their optimizer states. Where gradients are
    # averaged at every step (`post_local` before its switch) a NaN reaches all workers, and the run ends either way.
    not_finite: Literal["stop", "leave_out"] = "stop"
    # On SIGTERM or SIGUSR1: train to the end of the round, or end the round at the step that the foremost worker has
    # reached; then save and exit.
    on_signal: Literal["finish_round", "cut_round"] = "finish_round"


class QSRConfig(StrictModel):
    """The `"qsr"` block of a DeepSpeed configuration.

    `alpha` and `power` are read by the strategy `qsr` only; `h_base` by every strategy but `parallel`. Without an
    `lr` block the learning rate is read from the optimizer, which the caller's own scheduler sets; `warmup_steps`
    then says how long that scheduler warms up, since the period is h_base for as long.
    """

    strategy: Literal["qsr", "constant", "parallel", "post_local", "swap"] = "qsr"
    h_base: PositiveInt = 1
    alpha: NonNegative | None = None
    power: Positive = 2.0
    switch_step: Count | None = None
    total_steps: PositiveInt
    lr: LearningRateConfig | None = None
    warmup_steps: Count | None = None
    worker_size: PositiveInt = 1
    averaging: AveragingConfig = AveragingConfig()
    outer: OuterConfig | None = None  # None: the plain average, as in the paper
    # From a checkpoint of another number of workers: every optimizer starts from the mean of their states, or anew.
    on_other_workers: Literal["mean", "fresh"] = "mean"
    faults: FaultsConfig = FaultsConfig()

    @property
    def period_warmup_steps(self) -> int:
        """Steps for which the period stays at h_base because the learning rate warms up."""
        return self.lr.warmup_steps if self.lr else self.warmup_steps or 0

    @model_validator(mode="after")
    def _consistent(self) -> QSRConfig:
        if self.outer is not None and self.strategy == "parallel":
            raise ValueError("outer is set, and strategy 'parallel' averages no parameters; write null")
        if self.outer is not None and self.averaging.overlap == "delayed":
            raise ValueError(
                "outer is set and averaging.overlap is 'delayed', which leaves the workers at different parameters; "
                "write outer null, or the overlap 'none' or 'next_forward'"
            )
        _check_faults(self)
        _check_strategy(self)
        _check_steps(self)
        return self


def _check_faults(qsr: QSRConfig) -> None:
    if qsr.faults.not_finite == "leave_out" and qsr.strategy == "parallel":
        raise ValueError(
            "faults.not_finite is 'leave_out', and strategy 'parallel' averages gradients at every step, so that a NaN "
            "of one worker is in all of them; write 'stop', or a strategy of local steps such as 'qsr'"
        )
    if qsr.faults.not_finite == "leave_out" and qsr.averaging.overlap == "delayed":
        raise ValueError(
            "faults.not_finite is 'leave_out' and averaging.overlap is 'delayed', where a worker goes on from its own "
            "parameters until the average comes; write not_finite 'stop', or the overlap 'none' or 'next_forward'"
        )


def _check_strategy(qsr: QSRConfig) -> None:
    if qsr.strategy == "qsr" and qsr.alpha is None:
        raise ValueError("alpha is missing, and strategy 'qsr' needs it; write for example 0.0175 (0 is constant H)")
    if qsr.strategy in ("post_local", "swap") and qsr.switch_step is None:
        raise ValueError(
            f"switch_step is missing, and strategy {qsr.strategy!r} needs it; write a step from 0 to total_steps"
        )
    if qsr.strategy not in ("post_local", "swap") and qsr.switch_step is not None:
        raise ValueError(
            f"switch_step is {qsr.switch_step}, and strategy {qsr.strategy!r} does not read it; write null, or one of "
            "the strategies post_local and swap"
        )
    if qsr.lr is not None and qsr.warmup_steps is not None:
        raise ValueError("warmup_steps stands beside an lr block; write it inside: qsr.lr.warmup_steps")
    if qsr.lr is None and qsr.warmup_steps is None and qsr.strategy == "qsr" and qsr.alpha:
        raise ValueError(
            "warmup_steps is missing, and there is no lr block: H is h_base while your scheduler warms up, and without "
            "its length a warm-up would start with one huge round; write it in steps, 0 for none"
        )


def _check_steps(qsr: QSRConfig) -> None:
    if qsr.period_warmup_steps > qsr.total_steps:
        path = "lr.warmup_steps" if qsr.lr else "warmup_steps"
        raise ValueError(
            f"{path} is {qsr.period_warmup_steps} and total_steps is {qsr.total_steps}; write a warm-up that ends "
            "within the run"
        )
    if qsr.switch_step is not None and qsr.switch_step > qsr.total_steps:
        raise ValueError(
            f"switch_step is {qsr.switch_step} and total_steps is {qsr.total_steps}; write a step within the run"
        )


# ------------------------------------------------------------------------------------------------------- FSDP


class FSDPOptions(StrictModel):
    """What the FSDP engine does beside sharding a worker's parameters over its ranks."""

    # Free a block's gathered parameters after its forward and gather them again for its backward.
    reshard_after_forward: bool = True
    cpu_offload: bool = False  # on a GPU: parameters, gradients and optimizer state stay on the CPU
    activation_checkpointing: bool = False  # every block keeps its input only, and computes the rest again
    compile: bool = False  # torch.compile for every block


class EnabledConfig(StrictModel):
    """DeepSpeed's switch of a precision."""

    enabled: bool = False


class TensorBoardConfig(StrictModel):
    """DeepSpeed's `tensorboard` block: event files in output_path/job_name."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class FSDPConfig(StrictModel):
    """The configuration of `initialize_fsdp`: DeepSpeed's keys that mean something there, `fsdp` and `qsr`."""

    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    gradient_clipping: NonNegative = 1.0  # per worker; DeepSpeed's own default, so that both engines read it alike
    bf16: EnabledConfig = EnabledConfig()
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    fsdp: FSDPOptions = FSDPOptions()
    qsr: QSRConfig


def _is_off(key: str, block: Any) -> bool:
    """A block of DeepSpeed's that is switched off, which a user's file may hold and which says nothing here."""
    if key == "zero_optimization":
        return bool(block == {"stage": 0})
    return key in ("fp16", "compile") and isinstance(block, Mapping) and block.get("enabled") is False


# Keys of DeepSpeed's that a user brings along, and what stands for them here.
_NOT_FOR_FSDP = {
    "zero_optimization": "a worker's ranks shard everything, as ZeRO stage 3 does; fsdp.reshard_after_forward false "
    "keeps parameters gathered from forward to backward, and fsdp.cpu_offload is the offload",
    "optimizer": "give initialize_fsdp(optimizer=lambda parameters: torch.optim.AdamW(parameters, ...))",
    "scheduler": "write qsr.lr, or give initialize_fsdp(lr_scheduler=lambda optimizer: ...)",
    "fp16": "there is no loss scaling; write bf16",
    "activation_checkpointing": "write fsdp.activation_checkpointing",
    "compile": "write fsdp.compile",
    "communication_data_type": "gradients are reduced in fp32",
    "data_types": "gradients are accumulated and reduced in fp32",
}


def load_fsdp_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> FSDPConfig:
    """Read and check the configuration of `initialize_fsdp`.

    Args:
        config: path of a JSON file, or a mapping.
    Raises:
        ConfigError: it cannot be read, or a key is unknown, means nothing under FSDP, or is wrong.
    """
    where = "config" if isinstance(config, Mapping) else str(config)
    raw, qsr = split_deepspeed_config(config)
    raw = {key: value for key, value in raw.items() if not _is_off(key, value)}
    lines = [
        f"{where}: {key}: the FSDP engine does not read it; {_NOT_FOR_FSDP[key]}" for key in raw if key in _NOT_FOR_FSDP
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    return validate(FSDPConfig, {**raw, "qsr": qsr}, where=where)


# ---------------------------------------------------------------------------------------------------- recipes


class RecipeLearningRate(LearningRateConfig):
    """In a recipe, warm-up and decay points may be given in epochs instead of steps."""

    warmup_epochs: NonNegative | None = None
    decay_epochs: list[Positive] | None = None


class RecipeQSR(QSRConfig):
    """In a recipe, total_steps may follow from `epochs`, and the switch may be given in epochs."""

    total_steps: PositiveInt | None = None  # type: ignore[assignment]  # resolve_recipe() fills it in
    lr: RecipeLearningRate
    switch_epoch: NonNegative | None = None

    @model_validator(mode="after")
    def _consistent(self) -> RecipeQSR:
        # Checked as a QSRConfig by resolve_recipe(), when every duration is known in steps.
        return self


class ModelConfig(StrictModel):
    """A model by name, with keyword arguments for its constructor.

    `timm/NAME`, `torchvision/NAME`, or `qsr/NAME` for the package's own (`qsr_engine.models`).
    """

    name: Annotated[str, Field(pattern=r"^(timm|torchvision|qsr)/[\w.\-]+$")]
    kwargs: dict[str, Any] = {}
    channels_last: bool = False  # memory format of its convolutions; images come so already


class RandAugmentConfig(StrictModel):
    """RandAugment (Cubuk et al., arXiv 1909.13719): N operations of magnitude M; the paper of QSR has 2 and 10."""

    operations: PositiveInt = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 10


class DataConfig(StrictModel):
    """WebDataset shards in one folder with an `index.json` (see `qsr_engine.data`)."""

    shards: Annotated[str, Field(min_length=1)]  # a folder, or the URL of one: http://, https://, s3://, gs://, ...
    train: str = "train"  # split names in index.json
    eval: str = "val"
    train_samples: PositiveInt | None = None  # in the split `train`: a plan without the shards; compared with them
    image_size: PositiveInt
    augment: Literal["none", "crop", "crop_flip"] = "none"
    randaugment: RandAugmentConfig | None = None
    mixup: NonNegative = 0.0  # alpha of MixUp's Beta distribution; 0 mixes nothing
    shuffle_buffer: PositiveInt = 4096  # samples
    loader_processes: Count = 0
    max_bad_samples: Count = 0  # that each rank may skip in a run; with 0 the first one ends the run
    retries: Count = 3  # of a read that failed in a way that may pass (network, file server), before the sample is bad
    # Before the first retry, doubled for each further one, to 60 at most. A rank that waits so takes no step: all waits
    # together must be shorter than qsr.faults.timeout_seconds.
    retry_seconds: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 1.0
    decoder: Literal["cpu", "gpu"] = "cpu"  # "gpu": JPEGs by the GPU's decoder, through torchvision
    cache_dir: str | None = None  # of shards from a URL; None: qsr_engine in the user's cache folder
    cache_gb: Annotated[float, Field(ge=0, le=1e9)] = (
        100.0  # that all copies in it may take; 0 keeps nothing and reads them as they come
    )

    @model_validator(mode="after")
    def _gpu_decoder_reads_alone(self) -> DataConfig:
        if self.decoder == "gpu" and self.loader_processes:
            raise ValueError(
                f"decoder is 'gpu', and loader_processes is {self.loader_processes}; the GPU decodes for its rank "
                "alone: write loader_processes: 0"
            )
        return self


class BatchConfig(StrictModel):
    """DeepSpeed's three batch sizes. train_batch_size counts the samples of one step over all ranks."""

    train_batch_size: PositiveInt
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None  # follows from the other two
    # Where a run goes on with another number of ranks: "keep" train_batch_size and divide it among them, or let every
    # rank keep its part ("per_rank"), so that a step has other samples in all. The learning rate and H do not change.
    on_other_ranks: Literal["keep", "per_rank"] = "keep"


class OptimizerConfig(StrictModel):
    """The local optimizer of every worker. The learning rate comes from qsr.lr."""

    type: Literal["AdamW", "SGD"]
    weight_decay: NonNegative = 0.0
    decay_norms_and_biases: bool = True  # false: weight_decay on parameters of two and more dimensions only
    betas: Annotated[list[NonNegative], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Positive = 1e-8
    momentum: NonNegative = 0.0
    nesterov: bool = False
    gradient_clipping: NonNegative = 0.0  # per worker; 0 clips nothing (DeepSpeed's own default is 1.0)


class BatchNormConfig(StrictModel):
    """Batch norm's running statistics are estimated anew before every evaluation, on the averaged parameters.

    The defaults are the paper's: 128 micro-batches of 32, over all ranks together.
    """

    batches: PositiveInt = 128
    batch_size: PositiveInt = 32


class PrecisionConfig(StrictModel):
    """What the forward and backward pass compute in; the masters are fp32. ZeRO shards inside a worker.

    The engine "fsdp" does not read zero_stage: it shards everything inside a worker, and `fsdp` says the rest.
    """

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0


class LoggingConfig(StrictModel):
    """The run's folder is dir/name; `every`, `eval_every` and `checkpoint_every` count optimizer steps."""

    dir: str = "runs"
    name: Annotated[str, Field(pattern=r"^\w[\w.\-]*$")]
    every: PositiveInt = 10
    eval_every: PositiveInt | None = None  # None: at the end of the run only
    checkpoint_every: PositiveInt | None = None  # each at the next boundary; None: no checkpoints
    keep_checkpoints: PositiveInt | None = None  # the newest so many; older ones are deleted. None: all are kept
    sharpness_samples: Count = 0  # training pictures for the sharpness that each evaluation measures; 0: it does not
    tensorboard: bool = True


class Recipe(StrictModel):
    """One run, whole. `epochs` or `qsr.total_steps` says how long it is, not both."""

    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    precision: PrecisionConfig = PrecisionConfig()
    engine: Literal["deepspeed", "fsdp"] = "deepspeed"
    fsdp: FSDPOptions = FSDPOptions()  # read by the engine "fsdp" only
    qsr: RecipeQSR
    logging: LoggingConfig
    batch_norm: BatchNormConfig | None = None  # None: the statistics that training itself keeps
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epochs: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0

    @property
    def run_dir(self) -> Path:
        return Path(self.logging.dir) / self.logging.name

    @model_validator(mode="after")
    def _fp16_needs_loss_scaling(self) -> Recipe:
        if self.precision.dtype == "fp16" and self.engine == "fsdp":
            raise ValueError(
                "precision.dtype is 'fp16' and the engine is 'fsdp', which does not scale the loss; write bf16, or the "
                "engine deepspeed"
            )
        if self.precision.dtype == "fp16" and self.precision.zero_stage == 0:
            raise ValueError(
                "precision.dtype is 'fp16' and precision.zero_stage is 0, where DeepSpeed does not scale the loss; "
                "write zero_stage: 1"
            )
        return self


# ------------------------------------------------------------------------------------- DeepSpeed configuration


def split_deepspeed_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, Any], QSRConfig]:
    """Take the `"qsr"` block out of a DeepSpeed configuration.

    Args:
        config: path of a JSON file, or a mapping.
    Returns:
        What DeepSpeed itself reads, and the checked block.
    Raises:
        ConfigError: the file cannot be read, or there is no `"qsr"` block, or it is wrong.
    """
    where = "config" if isinstance(config, Mapping) else str(config)
    raw = read_deepspeed_config(config)
    if "qsr" not in raw:
        near = [key for key in raw if difflib.get_close_matches("qsr", [str(key).lower()], cutoff=0.5)]
        hint = f"; did you mean {near[0]!r} to be 'qsr'?" if near else "."
        raise ConfigError(
            f'{where}: there is no "qsr" block{hint} Write for example '
            '"qsr": {"strategy": "qsr", "h_base": 4, "alpha": 0.0175, "total_steps": 93600, "lr": {...}}'
        )
    qsr = validate(QSRConfig, raw.pop("qsr"), where=where, prefix="qsr.")
    return raw, qsr


def read_deepspeed_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a DeepSpeed configuration, in a dict of their own.

    Raises:
        ConfigError: the file cannot be read.
    """
    return dict(config) if isinstance(config, Mapping) else _read_json(Path(os.fspath(config)))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"the key {twice!r} is given twice")
    return dict(pairs)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this configuration: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON file that can be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration is a JSON object; found {type(raw).__name__}")
    return raw


def resolve_batch(
    world_size: int, *, train_batch_size: int | None, micro_batch_size: int | None, accumulation: int | None
) -> tuple[int, int, int]:
    """Complete DeepSpeed's three batch sizes as DeepSpeed does, over all ranks.

    Returns:
        (train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps), all in samples or
        micro-batches, with train_batch_size == micro * accumulation * world_size.
    Raises:
        ConfigError: they contradict one another, or none that says a size is given.
    """
    if train_batch_size is None and micro_batch_size is None:
        raise ConfigError("found neither train_batch_size nor train_micro_batch_size_per_gpu; write at least one")
    if train_batch_size is not None and micro_batch_size is not None and accumulation is None:
        accumulation = max(1, train_batch_size // (micro_batch_size * world_size))
    accumulation = accumulation or 1
    if micro_batch_size is None:
        assert train_batch_size is not None
        micro_batch_size = max(1, train_batch_size // (accumulation * world_size))
    product = micro_batch_size * accumulation * world_size
    if train_batch_size is not None and train_batch_size != product:
        raise ConfigError(
            f"train_batch_size is {train_batch_size}, but train_micro_batch_size_per_gpu {micro_batch_size} x "
            f"gradient_accumulation_steps {accumulation} x {world_size} ranks is {product}; write "
            f"train_batch_size {product}, or leave one of the three out"
        )
    return product, micro_batch_size, accumulation


def check_world_size(world_size: int, worker_size: int) -> int:
    """Number of workers K. Raises ConfigError where the ranks don't divide into workers."""
    if world_size % worker_size:
        near = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ConfigError(
            f"qsr.worker_size is {worker_size} and there are {world_size} ranks, which is not a multiple of it; "
            f"write a worker_size among {near}, or start another number of ranks"
        )
    return world_size // worker_size


def digest(config: Mapping[str, Any]) -> int:
    """A 63-bit digest of a configuration, the same on every rank that has the same one."""
    text = json.dumps(config, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path of the key, value) of nested mappings; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ----------------------------------------------------------------------------------------------------- errors

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], raw: Any, *, where: str, prefix: str = "") -> Model:
    """Check raw against a model; every mistake of it is in one ConfigError, a line each."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = _explain(model, error)
        lines = [f"{where}: {(prefix + line).replace('.: ', ': ', 1)}" for line in found]  # ".: " where it is no block
        raise ConfigError("\n".join(lines)) from None


def _explain(model: type[BaseModel], error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key{_nearest(model, item['loc'])}")
        elif item["type"] == "missing":
            lines.append(f"{path}: this key is missing; write it")
        elif item["type"] == "value_error":
            lines.append(f"{path + ': ' if path else ''}{item['ctx']['error']}")
        else:
            lines.append(f"{path}: found {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}")
    return lines


def _nearest(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    block: Any = model
    for part in loc[:-1]:
        block = submodel(block, str(part))
        if block is None:
            return ""
    names = list(block.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; the keys here are {', '.join(names)}"


def submodel(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a block inside another, None for a plain key."""
    field = model.model_fields.get(name)
    if field is None:
        return None
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
