"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from rlrestore.planning.needs import Line
from rlrestore.planning.plan import GIB, Plan, verdict
from rlrestore.planning.workload import Constants

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def amount(value: float, unit: str) -> str:
    if unit == "B":
        for size, name in UNITS:
            if value >= size:
                return f"{value / size:.2f} {name}"
        return f"{value:.0f} B"
    if unit == "s":
        return f"{value / 3600:.2f} h" if value >= 3600 else f"{value:.1f} s" if value >= 10 else f"{value:.3f} s"
    return f"{value:,.2f} {unit}" if unit else f"{value:g}"


def lines_table(lines: Sequence[Line]) -> list[str]:
    return [f"  {line.name:38} {amount(line.value, line.unit):>12}   {line.formula}" for line in lines]


def memory_section(plan: Plan) -> list[str]:
    memory = plan.chosen.memory
    text = [f"\nmemory of a trainer rank ({plan.chosen.name}, {plan.work.ranks} ranks)"]
    for item in memory.items:
        phases = "always" if len(item.phases) > 2 else " and ".join(item.phases)
        text.append(f"  {item.name:38} {amount(item.bytes, 'B'):>12}   {item.formula} [{phases}]")
    text.append(f"  {'peak':38} {amount(memory.peak, 'B'):>12}   in the phase '{memory.peak_phase}'")
    text.append("  by sharding:")
    for fit in plan.fits:
        says = "" if fit.fits is None else "fits" if fit.fits else "DOES NOT FIT"
        text.append(f"    {fit.name:36} {amount(fit.memory.peak, 'B'):>12}   {says}")
    if plan.rollout_actor is not None:
        text.append(f"  {'peak of a rollout actor':38} {amount(plan.rollout_actor.peak, 'B'):>12}")
    return text


def constants_section(constants: Constants) -> list[str]:
    text = [f"\nmeasured ({constants.source})"]
    text.append(
        f"  sample a chunk                         {constants.sample.fixed_s:.4f} s + {constants.sample.row_s:.4f} s a row"
    )
    text.append(
        f"  train a micro-batch at a point         {constants.train.fixed_s:.4f} s + {constants.train.row_s:.4f} s a row"
    )
    text.append(f"  optimiser step                         {constants.step_s:.4f} s")
    text.append(f"  score an image                         {constants.score.row_s:.4f} s")
    text += [f"    {name:36} {seconds:.4f} s" for name, seconds in sorted(constants.terms_s.items())]
    text.append(f"  draw a task                            {constants.draw_s:.4f} s")
    text.append(f"  spread of a unit of work               {constants.noise:.1%}")
    return text


def time_section(plan: Plan) -> list[str]:
    played = plan.simulated
    if played is None:
        return ["\ntime: nothing is known of this config's speed: add --probe, or --from-run RUN"]
    part, gain = plan.bottleneck
    busy = ", ".join(f"{name} {share:.0%}" for name, share in played.busy.items())
    text = [f"\nan iteration ({plan.work.rollouts} rollouts)", *lines_table(plan.stages)]
    text.append(f"  {'simulated':38} {amount(played.iteration_s, 's'):>12}   busy: {busy}")
    text.append(f"  {'images a second':38} {plan.work.rollouts / played.iteration_s:12.2f}")
    text.append(f"  {'bottleneck':38} {part:>12}   free, it would save {gain:.0%} of an iteration")
    text += ["", "workers", *lines_table(plan.workers), "", "the run", *lines_table(plan.run)]
    return text + (lines_table([plan.cost]) if plan.cost else [])


def scaling_section(plan: Plan) -> list[str]:
    text: list[str] = []
    for name, rows in plan.scales.items():
        what = "the same iteration on more GPUs" if name == "strong" else "groups grow with the GPUs"
        text += [f"\n{name} scaling: {what} (simulated)"]
        text.append("    GPUs  nodes  rollouts  rewards  iteration  images/s  efficiency  bottleneck")
        text += [
            f"  {row.gpus:6} {row.nodes:6} {row.rollouts:9} {row.reward_workers:8} {amount(row.iteration_s, 's'):>10} "
            f"{row.images_per_s:9.2f} {row.efficiency:10.0%}   {row.bottleneck} ({row.gain:.0%})"
            for row in rows
        ]
        text.append(f"  {verdict(plan.work, rows)}")
    return text


def plan_text(plan: Plan, limit_bytes: float | None) -> str:
    text = memory_section(plan)
    if limit_bytes is not None:
        peak = plan.chosen.memory.peak
        fitting = [fit.name for fit in plan.fits if fit.fits]
        text.append(
            f"  verdict: {plan.chosen.name} {'fits' if plan.chosen.fits else 'DOES NOT FIT'}: "
            f"{peak / GIB:.2f} of {limit_bytes / GIB:.2f} GiB"
            + (
                ""
                if plan.chosen.fits
                else f"; fitting: {', '.join(fitting) or 'none: lower engine.micro_batch, or use LoRA'}"
            )
        )
    if plan.constants is not None:
        text += constants_section(plan.constants)
    text += time_section(plan)
    text += ["\nobject store, an iteration", *lines_table([*plan.traffic, plan.in_flight])]
    text += ["\na checkpoint", *lines_table(plan.checkpoint)]
    return "\n".join(text + scaling_section(plan)).lstrip("\n")
