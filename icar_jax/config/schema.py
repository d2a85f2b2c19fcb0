"""The fields of a configuration.

Annotations here must stay real types (no `from __future__ import annotations`): the flags read them to parse overrides.
"""

from dataclasses import dataclass, field

TASKS = ("clip", "complexity")
MIN_VOCABULARY = 259  # of a byte-level tokenizer: 256 bytes, pad, start and end
SOURCES = ("scenes", "folder", "webdataset", "parquet", "tfds", "ratings")
FREEZE = ("image", "text", "exits", "temperature")
REMAT = ("none", "dots", "full")


@dataclass
class ClipConfig:
    """The CLIP model that is trained when task is 'clip'."""

    variant: str = "vit_b32"  # named architecture of models/variants.py
    exits: tuple[int, ...] = ()  # early exits as executed blocks, ascending, each below the tower's depth
    pool: str = "cls"  # token pooled at the exits: cls | mean | first_patch
    exit_start: str = "final"  # exit heads start from ln_post and proj ('final') or at random ('random')
    exit_head: str = "linear"  # before an exit's projection: linear (nothing) | adapter (small MLP) | attention (all tokens)
    exit_sum: bool = False  # an embedding is the sum of what all heads up to its depth give: each head corrects those before
    merge: tuple[int, ...] = ()  # patches merged into similar ones after the first block, the second, ... of the vision tower
    temperature: str = "own"  # each exit has its 'own' logit scale, or all use the 'shared' one
    depth: int = 0  # blocks of the vision tower; 0 keeps the variant's
    image_size: int = 0  # pixels; 0 keeps the variant's
    patch_size: int = 0  # pixels; 0 keeps the variant's
    context_length: int = 0  # tokens; 0 keeps the variant's


@dataclass
class ComplexityConfig:
    """The complexity model that is trained when task is 'complexity'."""

    variant: str = "convnextv2_nano"  # named ConvNeXt of models/variants.py, or blocks: a head on the first blocks of a CLIP
    head: str = "regression"  # regression (score in [0, 1]) | classification (probability of 'complex')
    image_size: int = 224  # pixels, squashed
    dropout: float = 0.2  # of the regression head, while training
    threshold: float = 0.5  # classification: a rated complexity above this is the class 'complex'
    class_weights: str = "none"  # of the cross-entropy: none | balanced (each class weighs as much as the other)
    target: str = "rating"  # what the score says: the image's 'rating', or its 'regret' if it left `clip` early
    # regret: InfoNCE term at the exit minus that at full depth ('loss'), weighed by how surely full depth finds the pair
    # ('kl'), or 1 - the 'cosine' of both embeddings.
    regret: str = "loss"
    exit: int = 0  # regret: the exit of `clip`, in executed blocks; 0 is its first one
    rivals: int = 0  # regret 'loss', 'kl': training pairs that each pair is compared with, beside those of the batch
    # Variant blocks: the tower's weights stay as they are, and its preprocessing replaces image_size, data.resize,
    # data.interpolation and data.normalise. Target regret: the CLIP's weights stay as they are.
    clip: str = ""  # checkpoint or workdir of the CLIP that it is to route
    blocks: int = 0  # variant blocks: blocks of its vision tower that run before the head; at most its first exit
    # Variant blocks: class token, mean and deviation are normed together ('whole'), or first each on its own ('parts'), so that
    # the largest does not drown the others.
    pooled_norm: str = "whole"


@dataclass
class DataConfig:
    """Where examples come from and how pictures and captions are prepared."""

    source: str = "scenes"  # scenes | folder (dataset*.json, captions.csv or .jsonl) | webdataset | parquet | tfds | ratings
    root: str = ""  # folder; webdataset, parquet: folder, glob or {000..123} of the shards; tfds: data_dir; unused by scenes
    train_split: str = "train"  # folder, tfds: name of the split; webdataset, parquet: subfolder of root, or . for root itself
    ratings: str = ""  # complexity: file of scores (.txt .json .csv .parquet); empty: ROOT/train.txt and test.txt (IC9600)
    bad_share: float = 0.01  # share of the lines of a file of scores that may be unusable; more stop the run
    dataset: str = ""  # tfds: name of the dataset, such as coco_captions
    image_column: str = "image"  # parquet: image bytes, a struct with bytes, or a path; tfds: image feature
    caption_column: str = "caption"  # parquet, tfds: text, or a list of texts
    calibration_size: int = 1000  # images cut from the training split; thresholds come from these alone
    scenes_size: int = 200_000  # scenes: pictures in the training split
    scenes_pixels: int = 64  # scenes: side they are drawn at, 32 to 512
    scenes_kept: str = ""  # scenes: folder that keeps drawn training pictures for later runs, 12 kB each at 64 pixels
    resize: str = "squash"  # squash | crop (shortest side, then centre)
    interpolation: str = "bicubic"  # bicubic | bilinear, both antialiased
    normalise: str = "half"  # mean and std of the pixels: half | openai | imagenet
    crop_scale: float = 1.0  # training: smallest share of the picture kept by a random crop; 1 means no crop
    flip: bool = False  # training: random horizontal flip (wrong for captions with left and right)
    rotate: float = 0.0  # training: degrees up to which a picture is turned either way; 0 switches it off
    translate: float = 0.0  # training: share of the side up to which it is shifted, across and down; 0 switches it off
    brightness: float = 0.0  # training: factor drawn from 1 - this to 1 + this; 0 switches it off, as for the next two
    contrast: float = 0.0
    saturation: float = 0.0
    tokenizer: str = ""  # tokenizer.json or CLIP merges file; empty trains one on the captions
    vocabulary: int = 4096  # size of a tokenizer trained here
    workers: int = 0  # worker processes that prepare batches; 0 uses threads of this process
    threads: int = 2  # threads that prepare batches, in each process
    retries: int = 3  # times a shard that cannot be read is tried again, with growing pauses, before the run stops
    stall_timeout_s: float = 600.0  # seconds without a batch after which the run stops, naming what it waited for


@dataclass
class OptimConfig:
    """The optimizer, with one learning rate for each parameter group."""

    kind: str = "adamw"  # adamw | muon (matrices by orthogonal momentum, the rest by Adam; rates mean the same)
    lr: float = 1e-3  # towers
    exit_lr: float = 1e-3  # exit heads
    temperature_lr: float = 1e-3  # logit scales (never decayed)
    rates: tuple[str, ...] = ()  # 'REGEX=SHARE' of the rate for parameters whose path it is found in; the first one counts
    weight_decay: float = 0.05  # matrices and embeddings only
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    clip_norm: float = 1.0  # global gradient norm; 0 switches clipping off
    warmup_steps: int = 100  # linear
    final_lr: float = 0.0  # the cosine ends at this share of the peak
    mu_dtype: str = "float32"  # of Adam's first moment: float32 | bfloat16
    ema: float = 0.0  # decay of an exponential moving average of the weights, which becomes the model; 0 switches it off


@dataclass
class LossConfig:
    """The contrastive loss at every exit and at full depth."""

    exit_weights: tuple[float, ...] = ()  # one weight for each exit, then full depth; empty weighs all equally
    direction: str = "symmetric"  # softmax: symmetric | image_to_text
    kind: str = "softmax"  # softmax (CLIP) | sigmoid (SigLIP: logit bias, every pair a decision of its own)
    distill_cosine: float = 0.0  # weight of 1 - cos(exit, full depth held still); 0 switches it off, as for the next three
    distill_kl: float = 0.0  # weight of KL(softmax of the similarities of full depth, held still || of the exit)
    distill_init: float = 0.0  # weight of 1 - cos(embedding, what config.train.init says); exits weigh as in their losses
    mixed: float = 0.0  # weight of the loss of one matrix of logits in which each image takes a random exit
    chunk: int = 0  # texts that a device scores at once while they pass round the ring of devices; 0 forms all logits at once


@dataclass
class TrainConfig:
    """Length, batch, precision and bookkeeping of a run."""

    steps: int = 1000
    epochs: float = 0.0  # passes over the training images; above 0 they set `steps`
    batch_size: int = 128  # pairs over all devices
    seed: int = 0
    dtype: str = "bfloat16"  # of activations: bfloat16 | float32; parameters and sums stay float32
    log_every: int = 20  # steps
    checkpoint_every: int = 500  # steps; the last step is always saved
    keep: int = 2  # checkpoints kept
    accumulate: int = 1  # parts a batch is encoded in, one after the other; the gradient is that of the whole batch
    remat: str = "none"  # what the backward pass computes again: none | dots (all but matrix products) | full (whole blocks)
    scan_blocks: bool = False  # one compiled block run in a loop: compiles faster and takes less memory on accelerators
    layer_dropout: float = 0.0  # chance that an image skips the last vision block in training, falling to 0 at the first block
    # What does not learn: groups (image | text | exits | temperature; ('image',) is LiT) and regular expressions that are
    # searched for in the paths of parameters, such as 'vision/blocks/[0-5]/'.
    freeze: tuple[str, ...] = ()
    init: str = ""  # checkpoint or workdir whose weights the run starts from; exits it lacks start from its final head
    eval_every: int = 0  # steps between evaluations while training; 0 evaluates only with evaluate.py, -1 once an epoch
    eval_split: str = ""  # what they are made on; empty: config.eval.split
    keep_best: bool = False  # also keep WORKDIR/best: best mean recall at 5 (clip), PCC (regression) or loss (classification)
    patience: int = 0  # evaluations without a better one after which the run ends; 0 runs all steps
    tensorboard: bool = False  # also write TensorBoard events (needs the [tensorboard] extra)


@dataclass
class MeshConfig:
    """Devices along each axis; one axis may be -1, which takes the remaining devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass
class DistractorConfig:
    """Pictures from elsewhere that fill up the galleries of an evaluation; nobody asks for them."""

    source: str = ""  # scenes | folder | webdataset | parquet; empty: no distractors
    root: str = ""  # as config.data.root
    split: str = ""  # scenes: a split; folder: a split, empty takes every image; webdataset, parquet: subfolder, empty is root
    image_column: str = "image"  # parquet: as config.data.image_column
    caption_column: str = "caption"  # parquet: as config.data.caption_column
    size: int = 0  # the first so many pictures; 0 takes all (scenes need a number)
    labels: str = ""  # JSON of URL or name -> category labels; pictures without any are irrelevant to every query


@dataclass
class EvalConfig:
    """What evaluate.py does with a trained model."""

    split: str = "val"  # scenes: val | test | relations | heldout; else a split of the folder
    size: int = 500  # scenes: pictures in the gallery
    complexity: str = ""  # complexity checkpoint or workdir that routes a plain CLIP; empty evaluates without
    early_share: tuple[float, ...] = ()  # share of calibration images for each early exit; empty: equal for all exits
    budgets: tuple[float, ...] = ()  # shares of full depth's counted cost that routing is tried at too, such as (0.6, 0.8)
    static: str = ""  # checkpoint or workdir of a smaller CLIP to compare with, run at its full depth
    batch_size: int = 64  # images in a full batch of the router
    dtype: str = "float32"  # of activations: bfloat16 | float32
    bootstrap: int = 2000  # resamples of images behind each interval
    random_draws: int = 100  # random assignments averaged into the run 'random' (its average precision: over the first 10)
    labels: str = ""  # JSON of URL or name -> category labels of the split; empty takes those of the source, where it has any
    score_calibration: str = "none"  # 'affine' also ranks the routed gallery by scores calibrated for each exit
    distractors: DistractorConfig = field(default_factory=DistractorConfig)


@dataclass
class ExperimentConfig:
    """Everything that train.py and evaluate.py need to know."""

    task: str = "clip"  # clip | complexity
    clip: ClipConfig = field(default_factory=ClipConfig)
    complexity: ComplexityConfig = field(default_factory=ComplexityConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
