"""Moments of the steps of one server, number by number: a part of the oracle of :mod:`one_deployment`."""

from __future__ import annotations

import math
from typing import Any


def step_moments(
    curve: Any, prompts: Any, batch: float, *, steps: float, dp: int, alone: bool, waits: bool, apart: float,
    looks: float, stages: int = 1,
) -> tuple[float, float, float, float, bool]:
    """The mean step, that which an arrival meets, that which it rides in, what a prompt adds, if prompts overrun."""
    plain = float(curve.at("seconds", batch)) / stages
    first = prompts.fixed_s
    first += plain if alone else (float(curve.at("attention_s", batch)) + prompts.token_s * batch) / stages
    # the prompt alone, in replies; of few users' prompts none is read while another is
    read = (first + prompts.prompt_s - prompts.expert_s * (dp - 1) / dp) / min(prompts.per_step, 1) / (steps * plain)
    behind = (prompts.passes - 1) * min(prompts.per_step, 1) * read if stages > 1 else 0.0  # on its way, in replies
    users = batch * (1 + read + behind)
    if users > 1:  # n (1 + (n - 1) read) = batch (1 + n read), and (n - 1) (1 + behind) more where there are stages
        half, writing = (1 + behind - read * (1 + batch)) / 2, batch + behind * (batch + 1)
        found = abs(half) + math.sqrt(half**2 + read * writing)  # of read n^2 + 2 half n - writing = 0
        users = max(writing / found if half > 0 else found / read, batch)
    arrivals = max(max(users - 1, 0) + (dp * users - max(users, 1)) * batch / users, 1e-6) / steps
    extra, per_rank = first - plain, arrivals / dp
    used, beside = per_rank / prompts.per_step, plain if alone else 0.0
    if prompts.per_step <= 1:
        mixed = some_read(used, apart / steps, dp, users, together=waits or not alone)
        idle = 1 - max(used, 1e-12) / max(mixed, 1e-12)
        readers = max(dp * (1 - idle), 1)
        late = prompts.late_s * (readers - 1) / (readers + 1) * (1 - 1 / (1 + apart * prompts.per_step))
        each = max(extra + prompts.prompt_s + late - prompts.expert_s * idle, 0.0)
        mean, variance = plain + mixed * each, varied(mixed) * each**2
        if alone and not waits:
            longer = max(each - plain, 0.0)
            mean = plain + used * each + (mixed - used) * longer
            variance = varied(used) * each**2 + varied(mixed - used) * longer**2
        own = (plain + each) / prompts.per_step - beside
        read, ridden = mixed, each if alone else plain + each
    else:
        part = (min(math.hypot(used, apart / steps), max(used, 1.0)) if dp > 1 else 1.0) / looks
        some = part * (1 - math.exp(-arrivals / part))
        most = part * min(arrivals / part, per_rank / part + math.sqrt(2 * math.log(dp) * per_rank / part))
        most, none = max(most, some, per_rank / min(max(users, 1 / dp), 1)), 1 - some
        idle = 1 - max(per_rank, 1e-12) / max(most, 1e-12)
        each = prompts.prompt_s - prompts.expert_s * idle
        mean = plain + max((max(1 - none, most / prompts.per_step) if alone else 1 - none) * extra + most * each, 0.0)
        if alone and not waits:
            busy = (1 - math.exp(-per_rank * looks)) / looks
            some = some_read(busy, apart / steps, dp, users, together=False)
            of_prompt = prompts.prompt_s - prompts.expert_s * (1 - max(busy, 1e-12) / max(some, 1e-12))
            reading = extra * max(1.0, per_rank / max(busy, 1e-12) / prompts.per_step)
            reading += of_prompt * per_rank / max(busy, 1e-12)
            mean = plain + busy * reading + (some - busy) * max(reading - plain, 0.0)
        scatter = each**2 * most + 2 * extra * each * most * none + extra**2 * none * (1 - none)
        variance = scatter / max(1 - (most * each / mean) ** 2, 1e-3)
        others = per_rank * (1 + variance / mean**2)
        own = (first - beside) * max(1.0, (1 + others / 2) / prompts.per_step) - prompts.expert_s * idle
        own += prompts.prompt_s * min(1 + others, max(prompts.per_step, 1 + others / 2))
        ridden = first - beside - prompts.expert_s * idle + prompts.prompt_s * min(1 + others, prompts.per_step)
        read = 1 - none if not alone else (
            (1 - math.exp(-per_rank * looks)) / looks if dp == 1 else some
        ) * max(1.0, per_rank / max((1 - math.exp(-per_rank * looks)) / looks, 1e-12) / prompts.per_step)
    own += (prompts.passes - 1) * ridden
    turns = 1 + read if alone else 1.0  # for each in which a micro-batch decodes
    share = min(read / turns, 1.0)
    if stages > 1:  # turns without prompts that others' hold up
        begun = -math.log1p(-min(share, 1 - 1e-12)) if prompts.per_step > 1 else share * prompts.per_step
        held = 1 - (1 - share) * math.exp(-begun * (stages - 1))
        mean += (held - share) * turns * max(ridden - plain, 0.0)
    met = mean + variance / mean
    own += met * used / (2 * (1.0 if alone else max(1 - used, 1e-3))) / max(prompts.per_step, 1.0)
    return mean, met, own, (mean - plain) / per_rank, used >= 0.98 and not alone


def some_read(used: float, apart: float, dp: int, users: float, *, together: bool) -> float:
    """Steps with prompts of any rank for one without, of ranks that read in one window of a reply's time."""
    window = min(math.hypot(used, apart), max(used, 1.0) if together else 1 + used)
    chance = -window * math.expm1(dp * math.log1p(-min(used / window, 1 - 1e-12)))
    return max(chance, used / min(max(users, 1 / dp), 1))  # one user, one rank


def varied(chance: float) -> float:
    return min(chance, 1.0) * max(1 - chance, 0.0)
