"""Prompts and groups for the tests of this folder."""

from megatron_rl.records import Prompt, Rollout, RolloutGroup


def make_prompt(source="own", answer="7", text="", **metadata):
    return Prompt(
        index=5, source=source, text=text, token_ids=(1,), answer=answer, metadata=dict(metadata)
    )


def make_group(texts, finish_reason="stop", **prompt):
    rollouts = tuple(
        Rollout(
            token_ids=(1, 2),
            loss_mask=(False, True),
            rollout_logprobs=(0.0, -1.0),
            weight_versions=(-1, 0),
            finish_reason=finish_reason,
            text=text,
        )
        for text in texts
    )
    return RolloutGroup(prompt=make_prompt(**prompt), rollouts=rollouts)
