"""The fields of a configuration, each with its rule beside it.

Annotations here must stay real types (no `from __future__ import annotations`): the flags read them to parse overrides.
"""

from dataclasses import dataclass, field

from icar_jax.config import choices
from icar_jax.config.rules import (
    Ascending,
    AtLeast,
    GroupsOrPatterns,
    LocalPath,
    OneOf,
    Rates,
    Shares,
    WeightsPath,
    Within,
    setting,
)
from icar_jax.files import limits

MIN_VOCABULARY = 259  # of a byte-level tokenizer: 256 bytes, pad, start and end
_OFF, _ONE_OFF = Within("[0, 1]", "0 switches it off"), Within("[0, 1)", "0 switches it off")
_WEIGHT = Within("[0, 1000000]", "0 switches it off")
_MOMENT = Within("[0, 1)", "for example 0.9")
_RATE = AtLeast(0, "use zero or a positive number", 1_000)  # larger ones overflow at the first step
_KEEPS = AtLeast(0, "0 keeps the variant's", 1 << 20)
_KEEPS_PIXELS = AtLeast(0, "0 keeps the variant's", 1 << 14)
_BOUNDED = Within("[-1000000, 1000000]")  # where other fields decide on the rest


@dataclass
class ClipConfig:
    """The CLIP model that is trained when task is 'clip'."""

    # Named architecture of models/variants.py, or init: that of config.train.init, or of init_image and init_text.
    variant: str = "vit_b32"
    exits: tuple[int, ...] = setting((), Ascending())  # early exits as executed blocks, each below the tower's depth
    pool: str = setting("cls", OneOf(choices.ExitPool))  # token pooled at the exits
    exit_start: str = setting("final", OneOf(choices.ExitStart))  # exit heads start from ln_post and proj, or at random
    # Before an exit's projection: linear (nothing) | adapter (small MLP) | attention (all tokens).
    exit_head: str = setting("linear", OneOf(choices.ExitHeadName))
    exit_sum: bool = False  # an embedding is the sum of all heads up to its depth: each head corrects those before
    merge: tuple[int, ...] = setting(
        (), _BOUNDED
    )  # patches merged into similar ones after the first block, the second, ...; or `reduce`
    # Token reduction: ToMe, PiToMe, CrossGET (both towers), or drop (HiRED).
    reduce: str = setting("none", OneOf(choices.ReductionName))
    # Tokens of an image that each block merges: one number for all blocks, or one for each. drop: patches dropped.
    reduce_r: tuple[int, ...] = setting((), _BOUNDED)
    reduce_to: float = setting(
        0.0, Within("[0, 1)", "0 leaves it to reduce_r")
    )  # share of the image tower's FLOPs, in place of reduce_r
    # Blocks before tokens are removed, which all routes share; drop: 0 is a third of the depth.
    reduce_after: int = setting(0, AtLeast(0, "use zero or a number of blocks"))
    reduce_text: tuple[int, ...] = setting((), _BOUNDED)  # crossget: as reduce_r, of a text
    reduce_proportional: bool = True  # attention proportional to the sizes of merged tokens
    # More schedules, as shares of FLOPs: routes beside the exits. Training draws one schedule a step.
    reduce_routes: tuple[float, ...] = setting((), Shares())
    temperature: str = setting("own", OneOf(choices.Temperature))  # each exit has its own logit scale, or all share one
    head: str = setting("", OneOf(choices.Head))  # token that full depth projects; empty keeps the variant's
    # To the embedding space: linear | linear_mlp (sum of both) | mlp; empty and 0 keep the variant's.
    projection: str = setting("", OneOf(choices.Projection))
    projection_width: int = setting(0, _KEEPS)  # hidden channels of the projection's MLP
    # Heads read the pooled tokens of the last blocks up to them, concatenated: their number. 0 keeps the variant's.
    head_blocks: int = setting(0, _KEEPS)
    text_head_blocks: int = setting(0, _KEEPS)  # the same for the text tower
    embed_dim: int = setting(0, _KEEPS)  # of the embedding space; 0 keeps the variant's
    depth: int = setting(
        0, AtLeast(0, "0 keeps the variant's", limits.DEPTH)
    )  # blocks of the vision tower; 0 keeps the variant's
    image_size: int = setting(0, _KEEPS_PIXELS)  # pixels; 0 keeps the variant's
    patch_size: int = setting(0, _KEEPS_PIXELS)  # pixels; 0 keeps the variant's
    context_length: int = setting(0, _BOUNDED)  # tokens; 0 keeps the variant's


@dataclass
class ComplexityConfig:
    """The complexity model that is trained when task is 'complexity'."""

    variant: str = "convnextv2_nano"  # named ConvNeXt of models/variants.py, or blocks: a head on the first blocks of a CLIP
    head: str = setting("regression", OneOf(choices.ScorerHead))  # score in [0, 1], or probability of 'complex'
    image_size: int = setting(224, AtLeast(-1, high=1 << 14))  # pixels, squashed
    dropout: float = setting(0.2, _BOUNDED)  # of the regression head, while training
    # Classification: a rated complexity above this is the class 'complex'.
    threshold: float = setting(0.5, Within("[0, 1)", "images rated above it are 'complex', and ratings lie in [0, 1]"))
    class_weights: str = setting("none", OneOf(choices.ClassWeights))  # of the cross-entropy; balanced: classes weigh alike
    target: str = setting("rating", OneOf(choices.Target))  # the image's rating, or its regret if it leaves `clip` early
    # Regret: InfoNCE term at the exit minus that at full depth ('loss'), weighted by full depth's probability of the pair
    # ('kl'), or 1 - the 'cosine' of both embeddings.
    regret: str = setting("loss", OneOf(choices.RegretName))
    exit: int = setting(0, _BOUNDED)  # regret: the exit of `clip`, in executed blocks; 0 is its first one
    rivals: int = setting(
        0, _BOUNDED
    )  # regret 'loss', 'kl': extra negatives (a memory bank of training pairs) beside the pairs of the batch
    # Variant blocks: the tower stays frozen, and its preprocessing replaces image_size, data.resize, data.interpolation and
    # data.normalise. Target regret: the CLIP stays frozen.
    clip: str = setting("", LocalPath())  # checkpoint or workdir of the CLIP that it routes
    blocks: int = setting(
        0, _BOUNDED
    )  # variant blocks: blocks of its vision tower that run before the head; at most its first exit
    # Variant blocks: class token, mean and deviation are normalised together ('whole'), or each on its own first ('parts'), so
    # that the largest does not dominate.
    pooled_norm: str = setting("whole", OneOf(choices.PooledNorm))
    # ConvNeXt: the head reads the mean of the last stage, or statistics of the responses of all layers to drawn filters.
    pool: str = setting("mean", OneOf(choices.ComplexityPool))
    # ridge: a linear head in closed form on all rated images, within their categories; `icar evaluate` cross-validates.
    fit: str = setting("sgd", OneOf(choices.Fit))
    # ridge: penalties to choose from, as shares of the features' variance; a larger one shrinks more.
    penalties: tuple[float, ...] = setting((0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), _BOUNDED)
    depths: tuple[int, ...] = setting(
        (2, 4, 6, 8), _BOUNDED
    )  # ridge: blocks of `clip` whose heads the cross-validation compares
    folds: int = setting(5, AtLeast(2))  # ridge: of the cross-validation


@dataclass
class DataConfig:
    """The source of the examples, and how images and captions are prepared."""

    source: str = setting("scenes", OneOf(choices.SourceName))  # docs/data.md lists their files
    # folder; webdataset, parquet: folder, glob or {000..123} of the shards; tfds: data_dir; unused by scenes
    root: str = setting("", LocalPath())
    # folder: caption file, where it does not lie in root or several do; folder of the images, where they lie elsewhere
    json: str = setting("", LocalPath())
    images: str = setting("", LocalPath())
    train_split: str = "train"  # folder, tfds: name of the split; webdataset, parquet: subfolder of root, or . for root itself
    # Complexity: file of scores (.txt .json .csv .parquet); empty: ROOT/train.txt and test.txt (IC9600) or ROOT/ratings.csv.
    ratings: str = setting("", LocalPath())
    # Complexity: categories of the images, from the column `category` or from their names (ad/003.jpg or ad_003.jpg).
    categories: str = setting("column", OneOf(choices.Categories))
    # Share of the lines of a file of scores that may be unusable, and of shards that may be empty; more stop the run.
    bad_share: float = setting(0.01, Within("[0, 1]", "0.01 allows one line in a hundred"))
    dataset: str = ""  # tfds: name of the dataset, such as coco_captions
    # parquet: image bytes, a struct with bytes, or a path; tfds: image feature; folder: file in a table (also `file`)
    image_column: str = "image"
    caption_column: str = "caption"  # parquet, tfds, folder: text, or a list of texts
    calibration_size: int = setting(1000, AtLeast(1))  # images cut from the training split, for thresholds alone
    scenes_size: int = setting(200_000, AtLeast(1))  # scenes: images in the training split
    scenes_pixels: int = setting(64, Within("[32, 512]"))  # scenes: side they are drawn at
    scenes_kept: str = setting("", LocalPath())  # scenes: folder that caches drawn training images, 12 kB each at 64 pixels
    # crop: shortest side, then centre. For this and the next two, init takes that of the weights the run starts from.
    resize: str = setting("squash", OneOf(choices.Resize))
    interpolation: str = setting("bicubic", OneOf(choices.Interpolation))  # antialiased
    normalise: str = setting("half", OneOf(choices.Normalise))  # mean and std of the pixels
    # Training: smallest share of the image that a random crop keeps; 1 means no crop.
    crop_scale: float = setting(1.0, Within("(0, 1]", "1 switches cropping off"))
    flip: bool = False  # training: random horizontal flip (wrong for captions with left and right)
    rotate: float = setting(0.0, Within("[0, 180]", "0 switches it off"))  # training: degrees, either way
    translate: float = setting(0.0, _OFF)  # training: share of the side up to which the image is shifted, across and down
    brightness: float = setting(0.0, _OFF)  # training: factor drawn from 1 - this to 1 + this, as for the next two
    contrast: float = setting(0.0, _OFF)
    saturation: float = setting(0.0, _OFF)
    tokenizer: str = setting("", LocalPath())  # tokenizer.json or CLIP merges file; empty trains one on the captions
    vocabulary: int = setting(4096, _BOUNDED)  # size of a tokenizer trained here
    workers: int = setting(
        0, AtLeast(0, "0 uses threads of this process", limits.WORKERS)
    )  # worker processes that prepare batches
    threads: int = setting(2, AtLeast(1, high=limits.THREADS))  # threads that prepare batches, in each process
    # Times a shard that cannot be read is tried again, with growing pauses, before the run stops.
    retries: int = setting(3, AtLeast(0, "0 stops at the first fault"))
    # Seconds without a batch after which the run stops, naming what it waited for.
    stall_timeout_s: float = setting(600.0, Within("(0, 1000000000]", "seconds; 86400 waits for a day"))


@dataclass
class OptimConfig:
    """The optimizer, with one learning rate for each parameter group."""

    kind: str = setting("adamw", OneOf(choices.Optimizer))  # muon: matrices by orthogonal momentum, the rest by Adam
    lr: float = setting(1e-3, _RATE)  # towers
    exit_lr: float = setting(1e-3, _RATE)  # exit heads
    temperature_lr: float = setting(1e-3, _RATE)  # logit scales (never decayed)
    # Each block's rate is this share of the next one's, from the last block of a tower down; 1 gives all the same.
    layer_decay: float = setting(1.0, Within("(0, 1]", "1 switches it off"), task="clip")
    # 'REGEX=SHARE' of the rate for parameters whose path the pattern is found in; the first match counts.
    rates: tuple[str, ...] = setting((), Rates())
    weight_decay: float = setting(0.05, _RATE)  # matrices and embeddings only
    b1: float = setting(0.9, _MOMENT)
    b2: float = setting(0.98, _MOMENT)
    eps: float = setting(1e-6, Within("[0, 1]", "for example 1e-6"))
    clip_norm: float = setting(1.0, _WEIGHT)  # global gradient norm; 0 switches clipping off
    warmup_steps: int = setting(100, AtLeast(0, "use zero or a positive number"))  # linear
    final_lr: float = setting(0.0, _RATE)  # the cosine ends at this share of the peak
    mu_dtype: str = setting("float32", OneOf(choices.Dtype))  # of Adam's first moment
    ema: float = setting(0.0, _MOMENT)  # decay of a moving average of the weights, which becomes the model; 0: off


@dataclass
class LossConfig:
    """The contrastive loss at every exit and at full depth."""

    exit_weights: tuple[float, ...] = setting(
        (), _BOUNDED
    )  # one weight for each exit, then full depth; empty weighs all equally
    direction: str = setting("symmetric", OneOf(choices.Direction))  # of softmax
    kind: str = setting("softmax", OneOf(choices.LossName))  # CLIP, or SigLIP: logit bias, every pair its own decision
    # Distillation weights: 1 - cos(exit, full depth); KL(softmax of the similarities of full depth || of the exit), both with
    # full depth as the teacher; 1 - cos(embedding, that of the weights in config.train.init), exits as in exit_weights.
    distill_cosine: float = setting(0.0, _WEIGHT, task="clip")
    distill_kl: float = setting(0.0, _WEIGHT, task="clip")
    distill_init: float = setting(0.0, _WEIGHT, task="clip")
    mixed: float = setting(0.0, _WEIGHT, task="clip")  # weight of the loss of a gallery whose images take random exits
    cross: float = setting(0.0, _WEIGHT, task="clip")  # weight of CrossGET's loss between the cross tokens of both towers
    cross_form: str = setting("crossget", OneOf(choices.CrossLossName))  # as its code computes it, or Jensen-Shannon
    image_ids: bool = setting(False, task="clip")  # softmax: captions of one image in a batch share its target
    # Texts that a device scores at once while they pass round the ring of devices; 0 forms all logits at once.
    chunk: int = setting(0, AtLeast(0, "0 forms all logits at once"), task="clip")


@dataclass
class TrainConfig:
    """Length, batch, precision and bookkeeping of a run."""

    steps: int = setting(1000, AtLeast(1))
    # Passes over the training images; above 0 they set `steps`.
    epochs: float = setting(0.0, AtLeast(0, "0 trains for config.train.steps", 1_000_000))
    batch_size: int = setting(128, AtLeast(2))  # pairs over all devices
    seed: int = setting(0, AtLeast(0, high=2**63 - 1))
    dtype: str = setting("bfloat16", OneOf(choices.Dtype))  # of activations; parameters and sums stay float32
    log_every: int = setting(20, AtLeast(1))  # steps
    checkpoint_every: int = setting(500, AtLeast(1))  # steps; the last step is always saved
    keep: int = setting(2, AtLeast(1))  # checkpoints kept
    # Parts that a batch is encoded in, one after the other; the gradient is that of the whole batch.
    accumulate: int = setting(1, AtLeast(1), task="clip")
    # Recomputed in the backward pass: none | dots (all but matrix products) | full (whole blocks).
    remat: str = setting("none", OneOf(choices.Remat), task="clip")
    # One compiled block run in a loop: compiles faster and takes less memory on accelerators.
    scan_blocks: bool = setting(False, task="clip")
    # Chance that an image skips the last vision block in training, falling to 0 at the first block.
    layer_dropout: float = setting(0.0, _ONE_OFF, task="clip")
    # Frozen parameters: groups (image | text | exits | temperature; ('image',) is LiT; image_trunk and text_trunk leave the
    # heads to learn) and regular expressions that are searched for in paths of parameters, such as 'vision/blocks/[0-5]/'.
    freeze: tuple[str, ...] = setting((), GroupsOrPatterns(), task="clip")
    # Checkpoint or workdir that the run is initialised from; exits it lacks start from its final head.
    init: str = setting("", WeightsPath())
    # Or its towers: vision tower and text tower, as checkpoints, weights that `icar convert` reads, or names of those on the
    # Hugging Face hub. Both, with config.clip.variant=init; the projections are drawn at random.
    init_image: str = setting("", WeightsPath(), task="clip")
    init_text: str = setting("", WeightsPath(), task="clip")
    # Compute the outputs of a frozen trunk once, when nothing augments the images, and keep them on disk for all runs.
    cache_frozen: bool = setting(False, task="clip")
    # Augmented views of each image that are kept, of which every epoch draws one; 1 without augmentation.
    cache_views: int = setting(1, AtLeast(1), task="clip")
    cache_folder: str = setting("", LocalPath())  # of cache_frozen; empty: ~/.cache/icar_jax/outputs
    cache_gb: float = setting(20.0, Within("(0, 1000000]", "gigabytes"))  # largest size of that folder; the oldest outputs go
    # Steps between evaluations while training.
    eval_every: int = setting(0, AtLeast(-1, "0 evaluates only with evaluate.py, -1 once an epoch"))
    eval_split: str = ""  # split of these evaluations; empty: config.eval.split
    keep_best: bool = False  # also keep WORKDIR/best: best mean recall at 5 (clip), PCC (regression) or loss (classification)
    # Evaluations without a better one after which the run ends.
    patience: int = setting(0, AtLeast(0, "0 runs all steps"))
    tensorboard: bool = False  # also write TensorBoard events (needs the [tensorboard] extra)


@dataclass
class MeshConfig:
    """Devices along each axis; one axis may be -1, which takes the remaining devices."""

    data: int = setting(-1, _BOUNDED)
    fsdp: int = setting(1, _BOUNDED)
    tensor: int = setting(1, _BOUNDED)


@dataclass
class DistractorConfig:
    """Images from elsewhere that enlarge the galleries of an evaluation; they are never queries or targets."""

    source: str = ""  # one of choices.DistractorSource; empty: no distractors
    root: str = setting("", LocalPath())  # as config.data.root, and so on
    json: str = setting("", LocalPath())
    images: str = setting("", LocalPath())
    split: str = ""  # scenes: a split; folder: a split, empty takes every image; webdataset, parquet: subfolder, empty is root
    image_column: str = "image"
    caption_column: str = "caption"
    size: int = setting(0, AtLeast(0, "0 takes all"))  # the first so many images; scenes need a number
    # JSON of URL or name -> category labels; images without any are irrelevant to every query.
    labels: str = setting("", LocalPath())


@dataclass
class EvalConfig:
    """The evaluation of a trained model."""

    split: str = "val"  # scenes: val | test | relations | heldout; else a split of the folder
    size: int = setting(500, AtLeast(1))  # scenes: images in the gallery
    # Complexity checkpoint or workdir that routes a plain CLIP; empty evaluates without.
    complexity: str = setting("", LocalPath())
    early_share: tuple[float, ...] = setting(
        (), _BOUNDED
    )  # share of calibration images for each early exit; empty: equal for all exits
    budgets: tuple[float, ...] = setting((), Shares())  # of full depth's counted cost, at which routing is evaluated too
    # Checkpoint or workdir of a shallower baseline, run at its full depth.
    static: str = setting("", LocalPath())
    batch_size: int = setting(64, AtLeast(1))  # images in a full batch of the router
    dtype: str = setting("float32", OneOf(choices.Dtype))  # of activations
    # Also evaluates so many equal parts of the split in order, each a gallery of its own: COCO's 5 of 1,000 images.
    folds: int = setting(0, AtLeast(0, "0 evaluates the whole split only"))
    timing_images: int = setting(512, AtLeast(1))  # images whose encoding is timed, at every exit and routed
    bootstrap: int = setting(2000, AtLeast(1))  # resamples of images behind each interval
    # Random assignments averaged into the run 'random' (its average precision: over the first 10).
    random_draws: int = setting(100, AtLeast(1))
    # JSON of URL or name -> category labels of the split; empty takes those of the source, where it has any.
    labels: str = setting("", LocalPath())
    # 'affine' also ranks the routed gallery by scores calibrated for each exit.
    score_calibration: str = setting("none", OneOf(choices.ScoreCalibrationName))
    distractors: DistractorConfig = field(default_factory=DistractorConfig)


@dataclass
class ExperimentConfig:
    """All settings of train.py and evaluate.py."""

    task: str = setting("clip", OneOf(choices.TaskName))
    clip: ClipConfig = field(default_factory=ClipConfig)
    complexity: ComplexityConfig = field(default_factory=ComplexityConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
