"""A recipe: one run of `qsr train`, whole. `recipe_file` reads it from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qsr_engine.config.fsdp import FSDPOptions
from qsr_engine.config.qsr import LearningRateConfig, QSRConfig
from qsr_engine.config.strict import Count, NonNegative, Positive, PositiveInt, StrictModel


class RecipeLearningRate(LearningRateConfig):
    """In a recipe, warm-up and decay points may be given in epochs instead of steps."""

    warmup_epochs: NonNegative | None = None
    """instead of `lr.warmup_steps`"""
    decay_epochs: list[Positive] | None = None
    """instead of `lr.decay_steps`"""

    @property
    def warms_up(self) -> bool:
        return self.warmup_steps > 0 or bool(self.warmup_epochs)


class RecipeQSR(QSRConfig):
    """In a recipe, total_steps may follow from `epochs`, and the switch may be given in epochs."""

    total_steps: PositiveInt | None = None  # type: ignore[assignment]  # resolve_recipe() fills it in
    lr: RecipeLearningRate
    switch_epoch: NonNegative | None = None
    """instead of `switch_step`"""

    @model_validator(mode="after")
    def _consistent(self) -> RecipeQSR:
        # Checked as a QSRConfig by resolve_recipe(), when every duration is known in steps.
        return self


class ModelConfig(StrictModel):
    """A model by name, with keyword arguments for its constructor.

    `timm/NAME`, `torchvision/NAME`, `qsr/NAME` for the package's own (`training/vit.py`), or `transformers/TYPE`.
    """

    name: Annotated[str, Field(pattern=r"^(timm|torchvision|qsr|transformers)/[\w.\-]+$")]
    """`timm/NAME`, `torchvision/NAME`, `qsr/simple_vit_b16`: the ViT-B/16 that the paper's authors train, vit-pytorch
    1.2.8's SimpleViT (its state fits, and the same seed gives the same first values), or `qsr/vit_base_patch16_sincos`:
    the plain ViT of [Beyer et al.](https://arxiv.org/abs/2205.01580), of timm's parts. Of the task `text`
    `transformers/TYPE`: a causal language model of that library, by the type of its configuration (`gpt2`, `llama`)"""
    kwargs: dict[str, Any] = {}
    """arguments of its constructor; `num_classes` comes from the data, and may be larger. A model that gives a tuple in
    training (GoogLeNet, Inception) trains with 0.3 of the losses of its auxiliary classifiers. The package's own take
    `img_size`, `patch_size`, `embed_dim`, `depth`, `num_heads`, `mlp_ratio`, and `qsr/simple_vit_b16` `head_dim` (64).
    Of `transformers/TYPE`: what its configuration takes; `vocab_size` comes from the data, and may be larger"""
    channels_last: bool = False
    """convolutions in channels-last memory, as images come. Parameters that ZeRO or FSDP shards are laid out anew; the
    engine `deepspeed` refuses it on a CPU"""


class RandAugmentConfig(StrictModel):
    """RandAugment (Cubuk et al., arXiv 1909.13719): N operations of magnitude M.

    The paper of QSR has 2 and 10 of "composer", whose largest magnitude is 10 (`data/randaugment.py`).
    """

    kind: Literal["torchvision", "composer"] = "torchvision"
    """`torchvision`, or `composer`, which is the paper's and much stronger: [randaugment.md](randaugment.md)"""
    operations: PositiveInt = 2
    """N: so many operations for each picture"""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 10
    """M: 0 to 30 of `torchvision`, 1 to 10 of `composer`"""

    @model_validator(mode="after")
    def _on_its_scale(self) -> RandAugmentConfig:
        if self.kind == "composer" and not 1 <= self.magnitude <= 10:
            raise ValueError(
                f"magnitude is {self.magnitude} and kind is 'composer', whose magnitudes are 1 to 10; write one of "
                "them, or kind torchvision, which has 0 to 30"
            )
        return self


class DataConfig(StrictModel):
    """WebDataset shards in folders with an `index.json` each (see `qsr_engine.data` and docs/data.md)."""

    shards: (
        Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    )
    """folder of WebDataset shards with an `index.json`, or the URL of one (`https://`, `s3://`, `gs://`, ...), or a
    list of them; each may have braces and, on this host, `*`, `?` and `[...]`, and a name that ends in `.tar` is one
    shard of its folder ([data.md](data.md)). Here, in `data.cache_dir`, `logging.dir` and `extends`, `${NAME}` is an
    environment variable of the rank's host (`$NAME` is not; inside `{...}` write quotes around it:
    `{shards: "${DATA}/train"}`); the run's `recipe.yaml` says what it stood for on rank 0"""
    loader: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """`package.module:function` that makes the loader of the training batches, instead of the shards
    ([data.md](data.md#a-loader-of-your-own)); `null`: the shards of the split `train`"""
    train: str = "train"
    """name of the split to train on"""
    eval: str = "val"
    """name of the split to evaluate on"""
    train_samples: PositiveInt | None = None
    """samples of the split `train`, so that `qsr plan` needs no shards; training refuses shards with another number;
    `null`: the index says it"""
    image_size: Count = 0
    """S; images become [3, S, S]. Required of images"""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """`none`, `crop` (random crop) or `crop_flip`; images of at most 64 pixels are padded and cropped"""
    randaugment: RandAugmentConfig | None = None
    """`null`: no RandAugment"""
    mixup: NonNegative = 0.0
    """alpha of MixUp, on the device; 0 mixes nothing"""
    shuffle: Literal["buffer", "samples"] = "buffer"
    """`buffer`: shards in a random order, and samples in a buffer; `samples`: all samples of the split, for shards on a
    fast disk of this host, whose index has a `samples.npy` ([data.md](data.md))"""
    shuffle_buffer: PositiveInt = 4096
    """samples of the local shuffle; shards are shuffled as well"""
    loader_processes: Count = 0
    """processes that decode, per rank; the batches are the same for any number"""
    loader_threads: Annotated[int, Field(ge=1, le=256)] = 1
    """threads that decode in each of them, or in the rank where there is none; the batches are the same for any number
    ([decoding.md](decoding.md))"""
    max_bad_samples: Count = 0
    """bad samples that each rank may skip in a run; with 0 the first one ends the run"""
    retries: Count = 3
    """of a read that failed in a way that may pass (network, file server, a file that is not there)"""
    retry_seconds: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 1.0
    """before the first retry, at most 60; doubled for each further one, up to 60; all together shorter than
    `qsr.faults.timeout_seconds`"""
    cache_dir: str | None = None
    """folder of the copies of shards from a URL; `null`: `qsr_engine` in the user's cache folder"""
    cache_gb: Annotated[float, Field(ge=0, le=1e9)] = 100.0
    """that all copies may take; 0 keeps none: every loader process then reads all the shards of its rank"""

    @model_validator(mode="before")
    @classmethod
    def _no_decoder(cls, given: Any) -> Any:
        """`decoder` chose between the CPU and nvJPEG, which is gone; older recipes and checkpoints still say cpu."""
        if not isinstance(given, dict) or "decoder" not in given:
            return given
        if given["decoder"] != "cpu":
            raise ValueError(
                f"decoder is {given['decoder']!r}, and pictures are decoded on the CPU only; leave decoder out, and "
                "write loader_processes: as many as there are cores for each rank"
            )
        return {key: value for key, value in given.items() if key != "decoder"}


class BatchConfig(StrictModel):
    """DeepSpeed's three batch sizes. train_batch_size counts the samples of one step over all ranks."""

    train_batch_size: PositiveInt
    """samples of one step over all ranks"""
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    """follows from the other two where it is not given"""
    gradient_accumulation_steps: PositiveInt | None = None
    """micro-batches of one step; `null`: 1, or what follows from the other two where both are given"""
    on_other_ranks: Literal["keep", "per_rank"] = "keep"
    """a run that goes on with another number of ranks, or whose members come and go: `keep` divides the global batch
    among them, `per_rank` leaves every rank its part. The learning rate and H stay"""


Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running mean


_READERS = {"betas": ("AdamW", "Muon"), "eps": ("AdamW", "Muon"), "momentum": ("SGD", "Muon"), "nesterov": ("SGD",)}


class OptimizerConfig(StrictModel):
    """The local optimizer of every worker. The learning rate comes from qsr.lr."""

    type: Literal["AdamW", "SGD", "Muon"]
    """`AdamW`, `SGD`, or with the engine `fsdp` `Muon`: torch's Muon on the matrices of hidden layers, and AdamW on all
    else ([which is which](averaging.md#muon-for-the-local-steps))"""
    weight_decay: NonNegative = 0.0
    """on all parameters"""
    decay_norms_and_biases: bool = True
    """`false`: no weight decay on parameters of one dimension (norms and biases)"""
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """of AdamW, also beside Muon"""
    eps: Positive = 1e-8
    """of AdamW, also beside Muon"""
    momentum: Decay = 0.0
    """of SGD and of Muon, which needs one, such as 0.95"""
    nesterov: bool = False
    """of SGD; Muon always takes Nesterov's form"""
    gradient_clipping: NonNegative = 0.0
    """L2 norm to which every worker clips its gradient; 0 for none"""

    @model_validator(mode="after")
    def _reads_all(self) -> OptimizerConfig:
        for key, readers in _READERS.items():
            value, default = getattr(self, key), OptimizerConfig.model_fields[key].default
            if self.type not in readers and value != default:
                verb = "reads" if len(readers) == 1 else "read"
                raise ValueError(
                    f"{key} is {value!r}, which {' and '.join(readers)} {verb}, and type is {self.type!r}; write "
                    f"{default!r}, or type {' or '.join(readers)}"
                )
        if self.type == "Muon" and not self.momentum:
            raise ValueError("type is 'Muon' and momentum is 0; write a momentum such as 0.95")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is true and momentum is 0; write a momentum such as 0.9, or nesterov false")
        return self


class BatchNormConfig(StrictModel):
    """Batch norm's running statistics are estimated anew before every evaluation, on the averaged parameters.

    The defaults are the paper's: 128 micro-batches of 32, over all ranks together.
    """

    batches: PositiveInt = 128
    """micro-batches over all ranks together, from which the statistics are estimated"""
    batch_size: PositiveInt = 32
    """samples in each of them"""


class PrecisionConfig(StrictModel):
    """What the forward and backward pass compute in; the masters are fp32. ZeRO shards inside a worker.

    dtype is the type of the whole model. With autocast its parameters stay fp32, and torch.autocast chooses the type of
    each operation, as in the paper.

    The engine "fsdp" has no zero_stage: it shards everything inside a worker, and `fsdp` says the rest.
    """

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """`fp32`, `bf16` or `fp16` (with `zero_stage` from 1 on; the loss scale is dynamic); the masters are fp32"""
    autocast: Literal["bf16", "fp16"] | None = None
    """`bf16` or `fp16` (engine `deepspeed`): parameters in fp32 under `torch.autocast`, the paper's own precision;
    `fp16` scales the loss"""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """0 to 3: ZeRO inside a worker, of the engine `deepspeed`"""

    @model_validator(mode="after")
    def _one_of_two(self) -> PrecisionConfig:
        if self.autocast and self.dtype != "fp32":
            raise ValueError(
                f"autocast is {self.autocast!r} and dtype is {self.dtype!r}, in which there would be no parameters in "
                "fp32 to cast; write dtype: fp32, or autocast: null"
            )
        return self


class LoggingConfig(StrictModel):
    """The run's folder is dir/name; `every`, `eval_every` and `checkpoint_every` count optimizer steps.

    Every run is evaluated at its end.
    """

    dir: str = "runs"
    """the run's folder is dir/name"""
    name: Annotated[str, Field(pattern=r"^\w[\w.\-]*$")]
    """by default the recipe file's name"""
    every: PositiveInt = 10
    """steps between two records"""
    eval_first: bool = False
    """evaluate the model before training too"""
    eval_every: PositiveInt | None = None
    """steps between two evaluations of the workers' average; a run is always evaluated at its end"""
    eval_every_epochs: Positive | None = None
    """the same in epochs, instead of `logging.eval_every`"""
    checkpoint_every: PositiveInt | None = None
    """steps between two checkpoints in `dir/name/checkpoints`; without it, none"""
    keep_checkpoints: PositiveInt | None = None
    """the newest so many whole checkpoints are kept, older ones are deleted; without it, all"""
    sharpness_samples: Count = 0
    """training pictures on which each evaluation measures the sharpness of the averaged model (largest eigenvalue of
    the Hessian), on rank 0 in fp32; 0: none"""
    norms: bool = True
    """L2 norms of gradient, parameters and optimizer state with every record ([their
    cost](records.md#norms))"""
    tensorboard: bool = True
    """write TensorBoard events beside `metrics.jsonl`"""
    trackers: list[
        Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
    ] = []
    """services that get TensorBoard's figures as well, by Accelerate's trackers ([how](records.md#other-trackers));
    `tensorboard` may stand among them"""

    @property
    def services(self) -> list[str]:
        """The trackers but for TensorBoard, each once."""
        return [name for name in dict.fromkeys(self.trackers) if name != "tensorboard"]

    @model_validator(mode="after")
    def _one_answer(self) -> LoggingConfig:
        if "tensorboard" in self.trackers and not self.tensorboard:
            raise ValueError("trackers holds 'tensorboard', and tensorboard is false; leave one of them out")
        return self


class Recipe(StrictModel):
    """One run. `epochs` or `qsr.total_steps` says how long it is, not both."""

    task: Literal["images", "text"] = "images"
    """what is trained: `images`, classes of pictures; or `text`, a language model on shards of `qsr shards text`
    ([language-models.md](language-models.md))"""
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    precision: PrecisionConfig = PrecisionConfig()
    engine: Literal["deepspeed", "fsdp"] = "deepspeed"
    """`deepspeed`, or `fsdp`: PyTorch's own sharding inside a worker; `qsr train --engine` sets it too"""
    fsdp: FSDPOptions = FSDPOptions()  # of the engine "fsdp"
    qsr: RecipeQSR
    logging: LoggingConfig
    batch_norm: BatchNormConfig | None = None
    """`null`: the running statistics that training keeps. A block: batch norm's statistics are estimated anew before
    every evaluation and for the saved model"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """of the cross-entropy"""
    epochs: Positive | None = None
    """length of the run, instead of `qsr.total_steps`; an epoch is samples // train_batch_size steps"""
    stop_at_step: PositiveInt | None = None
    """stop there, with learning rates and rounds of the whole run and a checkpoint. Inside a round, the model and its
    evaluation are the workers' average, and the checkpoint has every worker's own parameters: `--resume` with a later
    one, or null, goes on bit for bit"""
    stop_at_epoch: Positive | None = None
    """the same in epochs"""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """of initial parameters, order of the data and augmentation"""

    @property
    def run_dir(self) -> Path:
        return Path(self.logging.dir) / self.logging.name

    @property
    def last_step(self) -> int:
        """Steps that a resolved recipe takes: all of them, or up to where it is to stop."""
        assert self.qsr.total_steps is not None, "resolve_recipe() fills it in"
        return self.stop_at_step or self.qsr.total_steps

    @model_validator(mode="after")
    def _of_its_task(self) -> Recipe:
        of_text = self.model.name.startswith("transformers/")
        if of_text != (self.task == "text"):
            write = "transformers/gpt2, or task images" if self.task == "text" else "a model of images, or task text"
            raise ValueError(f"model.name is {self.model.name!r} and task is {self.task!r}; write {write}")
        if self.task == "images":
            if not self.data.image_size:
                raise ValueError("data.image_size: this key is missing; write it")
            return self
        for block, keys in _OF_IMAGES.items():
            given = getattr(self, block) if block else self
            for key in keys:
                if getattr(given, key) != type(given).model_fields[key].default:
                    name = f"{block}.{key}" if block else key
                    raise ValueError(f"{name} is for images, and task is 'text'; leave it out")
        return self

    @model_validator(mode="after")
    def _fp16_needs_loss_scaling(self) -> Recipe:
        key = "autocast" if self.precision.autocast else "dtype"
        if getattr(self.precision, key) == "fp16" and self.engine == "fsdp":
            raise ValueError(
                f"precision.{key} is 'fp16' and the engine is 'fsdp', which does not scale the loss; write bf16, or "
                "the engine deepspeed"
            )
        if self.precision.dtype == "fp16" and self.precision.zero_stage == 0:
            raise ValueError(
                "precision.dtype is 'fp16' and precision.zero_stage is 0, where DeepSpeed does not scale the loss; "
                "write zero_stage: 1"
            )
        return self

    @model_validator(mode="after")
    def _engine_reads_all(self) -> Recipe:
        if self.engine == "fsdp" and self.precision.zero_stage:
            raise ValueError(
                f"precision.zero_stage is {self.precision.zero_stage} and the engine is 'fsdp', which shards "
                "everything inside a worker, as stage 3 does; write zero_stage: 0 (`--set precision.zero_stage=0`), or "
                "the engine deepspeed"
            )
        if self.engine != "fsdp" and self.optimizer.type == "Muon":
            raise ValueError(
                f"optimizer.type is 'Muon' and the engine is {self.engine!r}, whose ZeRO stages give an optimizer flat "
                "parts of the parameters, and Muon needs matrices; write the engine fsdp, or type AdamW"
            )
        for key, value in self.fsdp:
            if self.engine != "fsdp" and value != getattr(FSDPOptions(), key):
                raise ValueError(
                    f"fsdp.{key} is {str(value).lower()}, and the engine {self.engine!r} does not read it; leave it "
                    "out, or write the engine fsdp"
                )
        return self


# The keys that a recipe of the task text cannot have, by their blocks.
_OF_IMAGES = {
    "data": ("image_size", "augment", "randaugment", "mixup", "loader"),
    "model": ("channels_last",),
    "": ("batch_norm",),
}
