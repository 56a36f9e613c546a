"""A recipe: one run of `qsr train`, whole. `recipe_file` reads it from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qsr_engine.config.batch import Batch, resolve_batch
from qsr_engine.config.fsdp import FSDPOptions
from qsr_engine.config.qsr import LearningRateConfig, QSRConfig
from qsr_engine.config.strict import ConfigError, Count, NonNegative, Positive, PositiveInt, StrictModel


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

    `timm/NAME`, `torchvision/NAME`, or `qsr/NAME` for the package's own (`training/vit.py`).
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


def resolve_recipe_batch(recipe: Recipe, ranks: int) -> Batch:
    """Batch sizes for so many ranks. Raises ConfigError where they contradict one another."""
    return Batch(
        *resolve_batch(
            ranks,
            train_batch_size=recipe.batch.train_batch_size,
            micro_batch_size=recipe.batch.train_micro_batch_size_per_gpu,
            accumulation=recipe.batch.gradient_accumulation_steps,
        )
    )


def batch_on_other_ranks(recipe: Recipe, ranks: int, then: Batch) -> Batch:
    """Batch sizes of a run that goes on from a checkpoint, perhaps with another number of ranks.

    As batch.on_other_ranks says. A rank has as many samples in a micro-batch as the recipe says, or, where it says
    nothing, as at the checkpoint; fewer, and more of them, where that does not divide the rank's share of a step.

    Args:
        then: those of the checkpoint. A run may have changed its ranks before it, so the recipe does not tell them.
    Raises:
        ConfigError: train_batch_size is to be kept, and cannot be divided among the ranks.
    """
    total = recipe.batch.train_batch_size
    if recipe.batch.on_other_ranks == "per_rank":
        total = then.micro * then.accumulation * ranks
    if total % ranks:
        multiples = range(recipe.qsr.worker_size, total + 1, recipe.qsr.worker_size)
        near = [number for number in multiples if total % number == 0]
        nearest = sorted(sorted(near, key=lambda number: abs(number - ranks))[:3])
        fitting = f"go on with {', '.join(map(str, nearest))} ranks, or write" if nearest else "write"
        raise ConfigError(
            f"batch.train_batch_size is {total}, which {ranks} ranks cannot divide among them, and "
            f"batch.on_other_ranks is 'keep'; {fitting} on_other_ranks: per_rank"
        )
    share, accumulation = total // ranks, recipe.batch.gradient_accumulation_steps
    given = recipe.batch.train_micro_batch_size_per_gpu or (share // accumulation if accumulation else then.micro)
    micro = max(size for size in range(1, max(1, min(given, share)) + 1) if share % size == 0)
    return Batch(total, micro, share // micro)
