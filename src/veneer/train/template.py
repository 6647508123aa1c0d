"""The commented run.yaml that `veneer init` writes. A test keeps it in step with settings.py."""

TEMPLATE = """\
# A training run. Start it with:      veneer train run.yaml
# Any key can be set on the way:      veneer train run.yaml lora.r=32 training.epochs=2
# Paths are relative to the folder the command is started in.

model: HuggingFaceTB/SmolLM2-135M-Instruct   # a hub id, or a folder that holds a transformers model
revision: null             # branch, tag or commit on the hub
dtype: auto                # float32 | bfloat16 | auto: bfloat16 where the accelerator has it, else float32
quantization: null         # the base in fewer bits: nf4 | fp4 | int8 (bitsandbytes) | torchao-int8 | torchao-int4

data:
  train: train.jsonl       # rows {"prompt": …, "completion": …} or {"messages": [{"role": …, "content": …}, …]}
  eval: null               # a second file of the same kind, for an evaluation loss
  eval_fraction: 0.0       # or: the share of the training rows set aside for it
  too_long: error          # rows longer than max_length: error | drop | cut

lora:
  r: 16                    # rank: the width of the adapter
  lora_alpha: 32           # the update is scaled by lora_alpha / r
  target_modules: all-linear   # or names: [q_proj, v_proj]; `veneer targets MODEL` lists them
  exclude_modules: null
  lora_dropout: 0.0
  use_rslora: false        # scale by lora_alpha / sqrt(r) instead
  use_dora: false          # learn magnitude and direction apart
  init_lora_weights: true  # true | gaussian | orthogonal | pissa | pissa_niter_16 | olora | mica | loftq | false
  loftq_config: null       # loftq: for example {loftq_bits: 4, loftq_iter: 1}
  lora_bias: false         # add a trained bias to each update
  bias: none               # none | lora_only | all
  modules_to_save: null    # layers trained in full beside the adapter
  trainable_token_indices: null   # tokens whose embedding is trained in full, for example [151643, 151644]
  ensure_weight_tying: false      # keep tied embeddings tied, also where they are adapted or trained
  target_parameters: null  # fused experts: [experts.gate_up_proj, experts.down_proj]; all-linear leaves them out
  layers_to_transform: null   # indices of the layers to adapt, for example [20, 21, 22]
  layers_pattern: null
  rank_pattern: {}         # other ranks for some layers, for example {down_proj: 32}
  alpha_pattern: {}
  layer_replication: null  # build the stack of layers from stretches of itself, for example [[0, 16], [8, 24]]
  alora_invocation_tokens: null   # the adapter acts from the last occurrence of these tokens on

training:
  epochs: 1                # passes over the data
  max_steps: null          # or steps: then epochs must be null
  batch_size: 8
  gradient_accumulation: 1 # batches for one step
  learning_rate: 2e-4
  optimizer: adamw         # adamw | loraplus: B learns faster than A | lorafa: A stays as it began, for less memory
  loraplus_lr_ratio: null  # loraplus: how many times faster; null: 16
  loraplus_lr_embedding: null   # loraplus: the learning rate of adapters on embeddings; null: 1e-6
  schedule: linear         # linear | cosine | constant
  warmup: 0.03             # steps until the full learning rate; below 1 it is a share of all steps
  weight_decay: 0.0
  max_grad_norm: 1.0
  max_length: 1024         # tokens in a row
  group_by_length: true    # rows of similar length in one step, so that less is padding; packing has none
  packing: false           # several rows in one sequence, which do not see each other
  gradient_checkpointing: false   # less memory, about a fifth slower
  seed: 0
  log_every: 1             # steps
  eval_every: null         # steps; null: after each epoch, where there are rows to evaluate on
  save_every: null         # steps between checkpoints; null: only the finished adapter is saved
  keep_checkpoints: 2
  resume: false            # go on from the newest checkpoint in output

output: runs/first         # OUTPUT/adapter is the result; a folder that is not empty is refused
overwrite: false           # unless this is true
"""
