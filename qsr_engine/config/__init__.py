"""What a user writes, checked before anything starts; nothing here imports torch.

strict        models whose unknown keys and wrong types are errors, with the nearest name
digest        nested values in one number, flat, and where two differ
qsr           the block `"qsr"`
batch         DeepSpeed's three batch sizes, and how ranks divide into workers
deepspeed     DeepSpeed's configuration: refusals by name, defaults made plain
              deepspeed_keys: what becomes of every key of DeepSpeed's
fsdp          the configuration of `initialize_fsdp`
recipe        a run of `qsr train`; recipe_file reads it from YAML
units         rates, durations and counts as they are written on a command line
"""
