"""Write what TRL's own trainers say of random log-probabilities: loss and gradient of every objective that it has.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, peft==0.21.2, trl==1.16.0, datasets, numpy.
Usage: python third_party/trl/golden.py tests/goldens/trl.npz

The methods that hold the formulas are called with a stand-in for `self` and with models that return the given log-probabilities, in
float64. `NAME` is the loss and `NAME/gradient` its derivative in the log-probabilities [b, 2, t] (or what else it reads). An objective with
a mean over the tokens of a micro-batch is called with one pair at a time, so that this is also the mean over each response; the loss is the
mean over calls.
"""

import collections
import sys
from types import SimpleNamespace

import numpy as np
import torch
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.experimental.orpo import ORPOTrainer
from trl.experimental.tpo import TPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

B, T, VOCAB, TEACHER_VOCAB = 4, 7, 11, 14


def problem() -> dict[str, np.ndarray]:
    """Return log-probabilities `[b, 2, t]` of responses of 1 to 6 tokens after a prompt of one, and of a third response for triples."""
    rng = np.random.default_rng(0)
    mask = np.zeros((B, 3, T))
    for index, length in enumerate([6, 3, 2, 1, 4, 5, 5, 5, 3, 3, 6, 4]):
        mask[index // 3, index % 3, 1 : 1 + length] = 1
    logps = -rng.gamma(1.5, size=mask.shape) * mask
    reference = (logps - rng.normal(size=mask.shape)) * mask
    return {
        "logps": logps,
        "reference_logps": reference,
        "loss_mask": mask,
        "log_collision": -rng.gamma(1.5, size=mask.shape) * mask,
        "mismatched_logps": -rng.gamma(1.5, size=(B, T)) * mask[:, 2],
        "mismatched_reference_logps": -rng.gamma(2.0, size=(B, T)) * mask[:, 2],
        "desirable": np.array([1.0, 0.0, 0.0, 1.0]),
        "rewards": rng.normal(size=(B, 2)),
        "margins": rng.normal(size=B),
        "logits": 2 * rng.normal(size=(B, T, VOCAB)),
        "teacher_logits": 2 * rng.normal(size=(B, T, VOCAB)),
        "other_logits": 2 * rng.normal(size=(B, T, TEACHER_VOCAB)),
    }


def accelerator():
    same = lambda x: x  # noqa: E731
    return SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same, unwrap_model=same)


def trainer(**fields) -> SimpleNamespace:
    model = torch.nn.Module()
    model.is_gradient_checkpointing = False
    return SimpleNamespace(
        accelerator=accelerator(),
        model=model,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None, center_rewards_coefficient=fields.pop("center", None)),
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        **fields,
    )


def scored(logps: torch.Tensor, log_collision: torch.Tensor | None = None):
    """Return a model that says `logps` of its rows; the first token has none."""
    nothing = torch.zeros_like(logps)
    said = {name: x[:, 1:] for name, x in (("log_probs", logps), ("entropy", nothing), ("mean_logits", nothing), ("is_top1", nothing > 0))}
    said["log_sum_sq_probs"] = None if log_collision is None else log_collision[:, 1:]
    return lambda *args, **options: SimpleNamespace(**said)


def flat(x: torch.Tensor) -> torch.Tensor:
    """Lay `[b, 2, t]` out as TRL does, all chosen rows and then all rejected."""
    return torch.cat(x.unbind(1))


def rows(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"completion_mask": mask.long(), "input_ids": torch.zeros_like(mask).long(), "attention_mask": torch.ones_like(mask).long()}


def dpo(logps, data, kinds=("sigmoid",), weights=None, smoothing=0.0, divergence="reverse_kl", ld_alpha=None, wpo=False):
    self = trainer(
        ld_alpha=ld_alpha,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.5,
        loss_types=list(kinds),
        loss_weights=weights or [1.0] * len(kinds),
        beta=0.3,
        label_smoothing=smoothing,
        use_weighting=wpo,
        ref_model=scored(flat(data["reference_logps"])),
    )
    return DPOTrainer._compute_loss(self, scored(flat(logps), flat(data["log_collision"])), rows(flat(data["loss_mask"])), False)


def kto(logps, data, kind="kto", weights=(1.0, 1.0)):
    mask, desirable = rows(data["loss_mask"]), data["desirable"].bool()
    inputs = mask | {f"KL_{name}": value for name, value in mask.items()} | {"label": desirable}
    policy, reference = scored(logps), scored(data["reference_logps"])
    kl = {policy: data["mismatched_logps"], reference: data["mismatched_reference_logps"]}
    self = trainer(
        calculate_KL=kind == "kto",
        loss_type=kind,
        beta=0.3,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        ref_model=reference,
    )
    self._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(self, scored(kl[model]), batch)
    return KTOTrainer._compute_loss(self, policy, inputs, False)


def averaged(logps, mask):
    return logps.sum(-1) / mask.sum(-1)


def orpo(logps, data):
    self = trainer(beta=0.3)
    losses = ORPOTrainer.odds_ratio_loss(self, *averaged(logps, data["loss_mask"]).unbind(1))[0]
    return -averaged(logps, data["loss_mask"])[:, 0].mean() - losses.mean()


def cpo(logps, data, kind="sigmoid", alpha=0.0, smoothing=0.0, gamma=0.0, nll=0.0):
    self = trainer(loss_type=kind, alpha=alpha, label_smoothing=smoothing, beta=0.3, simpo_gamma=gamma)
    sums = averaged(logps, data["loss_mask"]) if kind in ("ipo", "simpo") else logps.sum(-1)
    losses = CPOTrainer.cpo_loss(self, *sums.unbind(1))[0]
    return losses.mean() - nll * averaged(logps, data["loss_mask"])[:, 0].mean()


def tpo(logits, data, kind="sigmoid", gamma=0.5):
    """From logits `[b, 3, t, v]`, as this trainer takes nothing else: what is scored is token 0."""
    logits = torch.cat(logits.unbind(1))
    self = trainer(loss_type=kind, tpo_alpha=0.7, beta=0.3, label_smoothing=0.0, tpo_l_gamma=gamma)
    return TPOTrainer._compute_loss(self, lambda **_: SimpleNamespace(logits=logits), rows(torch.cat(data["loss_mask"].unbind(1))), False)


def reward(rewards, data, margin=False, center=None):
    inputs = {"attention_mask": torch.ones(2 * B, T)} | ({"margin": data["margins"]} if margin else {})
    model = lambda **_: SimpleNamespace(logits=torch.cat(rewards.unbind(1))[:, None])  # noqa: E731
    return RewardTrainer.compute_loss(trainer(center=center), model, inputs)


def jsd(logits, data, beta, temperature=1.0):
    labels = torch.where(data["loss_mask"] > 0, 0, -100)
    return GKDTrainer.generalized_jsd_loss(logits, data["teacher_logits"], labels, beta, temperature)


def uld(logits, data):
    """Over all positions of a row, as the trainer's mean is over rows."""
    self = SimpleNamespace(
        use_hybrid_loss=False,
        _vocab_mapping=None,
        use_extended_uld=False,
        token_merge_strategy="",
        skip_student_eos=False,
        skip_teacher_eos=False,
        student_temperature=1.0,
        teacher_temperature=1.0,
        distillation_weight=1.0,
        ignore_index=-100,
    )
    self._get_start_and_size_answers = lambda labels: ([0] * B, [T] * B)
    ids = torch.zeros(B, T).long()
    return ULDLoss._compute_distillation_loss(self, logits, data["other_logits"], ids, ids, ids, ids)


def gradient_of(function, at: np.ndarray, data, **options) -> tuple[np.ndarray, np.ndarray]:
    at = torch.tensor(at, requires_grad=True)
    loss = function(at, {name: torch.tensor(value) for name, value in data.items()}, **options)
    return loss.detach().numpy(), torch.autograd.grad(loss, at)[0].numpy()


def main() -> None:
    given = problem()
    pairs = {name: x[:, :2] if x.shape == (B, 3, T) else x for name, x in given.items()}
    single = {name: x[:, 0] if x.shape == (B, 3, T) else x for name, x in given.items()}
    found = dict(given)

    def add(name, function, at, data, **options):
        found[name], found[f"{name}/gradient"] = gradient_of(function, at, data, **options)

    def add_by_row(name, function, at, data, **options):
        parts = [gradient_of(function, at[n : n + 1], {k: v[n : n + 1] for k, v in data.items()}, **options) for n in range(B)]
        found[name], found[f"{name}/gradient"] = np.mean([p[0] for p in parts]), np.concatenate([p[1] for p in parts]) / B

    smoothing = {"exo_pair": 0.05, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}
    for (
        kind
    ) in "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sigmoid_norm".split():
        add(f"dpo/{kind}", dpo, pairs["logps"], pairs, kinds=[kind], smoothing=smoothing.get(kind, 0.0))
    for divergence in ("forward_kl", "js_divergence"):
        add(f"dpo/{divergence}", dpo, pairs["logps"], pairs, divergence=divergence)
    as32 = {name: x.astype(np.float32) for name, x in pairs.items()}  # the only types that TRL's alpha divergence knows are short ones
    add("dpo/alpha_divergence", dpo, as32["logps"], as32, divergence="alpha_divergence")
    add("dpo/ld", dpo, pairs["logps"], pairs, ld_alpha=0.4)
    add("dpo/wpo", dpo, pairs["logps"], pairs, wpo=True)
    add_by_row("dpo/mpo", dpo, pairs["logps"], pairs, kinds=("sigmoid", "bco_pair", "sft"), weights=[0.8, 0.2, 1.0])
    add("kto", kto, single["logps"], single, weights=(1.0, 1.5))
    add("kto/apo_zero_unpaired", kto, single["logps"], single, kind="apo_zero_unpaired")
    add("orpo", orpo, pairs["logps"], pairs)
    for kind in ("sigmoid", "hinge", "ipo"):
        add(f"cpo/{kind}", cpo, pairs["logps"], pairs, kind=kind, nll=0.7)
    add("cpo/smoothed", cpo, pairs["logps"], pairs, smoothing=0.1)
    add("cpo/simpo", cpo, pairs["logps"], pairs, kind="simpo", gamma=0.5)
    add("cpo/alphapo", cpo, pairs["logps"], pairs, kind="simpo", gamma=0.5, alpha=0.25)
    add("reward", reward, given["rewards"], given)
    add("reward/margin", reward, given["rewards"], given, margin=True, center=0.01)
    for beta in (0.0, 0.1, 0.5, 1.0):
        add(f"jsd/{beta}", jsd, given["logits"], single, beta=beta)
    add("jsd/warm", jsd, given["logits"], single, beta=0.5, temperature=0.9)
    add("uld", uld, given["logits"], given)
    found["triple_logits"] = 2 * np.random.default_rng(1).normal(size=(B, 3, T, VOCAB))
    for kind in ("sigmoid", "tpo-l"):
        add_by_row(f"tpo/{kind}", tpo, found["triple_logits"], given, kind=kind)
    np.savez_compressed(sys.argv[1], **found)


if __name__ == "__main__":
    main()
