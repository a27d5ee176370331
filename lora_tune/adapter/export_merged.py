"""Export as a merged model: base and adapter as one ordinary transformers folder, measured. No torch at the top."""

from __future__ import annotations

from pathlib import Path

from lora_tune.adapter.export_job import OUTPUT, Job, Written


def write_merged(job: Job, scratch: Path) -> Written:
    """The merged model as `lora-tune merge` writes it; every engine that takes the base takes it.

    Raises: CheckFailed where it would answer too far from the adapter as trained, or the folder has no manifest.
    """
    from lora_tune.adapter.merge_job import Method, Mixture, Precision, merge_folders, prepare_merge
    from lora_tune.adapter.transformers_words import transformers_words

    _, base = job.known_base()
    merge, _ = prepare_merge((job.folder,), base_name=base.name, data=job.data)
    mixture = Mixture(Method.linear, (1.0,), 1.0, 0)
    facts = merge_folders(merge, scratch, mixture=mixture, precision=Precision.auto, max_kl=job.max_kl)
    measured = facts["candidates"][facts["chosen"]]
    summary = (
        f"merged into the {facts['chosen']} base, {facts['dtype']}; {measured['kl']:.2e} nats (KL) from the adapter as "
        f"trained, same most likely token {measured['top1']:.2%}"
    )
    render, stops = transformers_words(scratch, model=scratch)
    how = (f"vllm serve {OUTPUT}", f"python -m sglang.launch_server --model-path {OUTPUT}")
    return Written({"summary": summary, **facts}, render, stops, how)
