"""AdamW for every parameter at B = 512, as a reference. The settings come from other work and were not tuned here."""

optimizer = "adamw"
lr = 1.8e-3
weight_decay = 0.1
schedule = "linear"
warmup_steps = 256
