# Amber 7B exactly (LLM360, 2023): 6,738,415,616 parameters, 1.26T tokens, 360 checkpoints.
# Every model and optimizer setting is the default of configs/__init__.py; what is written here is
# what a person should see. README.md, "Amber, 7B", has the commands.
tokenized = "data/AmberDatasets/train/train_*.jsonl"  # LLM360's released chunks, already tokenized
tokenizer = "hf:data/AmberDatasets/tokenizer.json"  # huggyllama/llama-7b
sequences_per_chunk = 1_706_976  # 762 steps of 2240 sequences; 96 are left over
n_chunks = 360
seq_len = 2048
global_batch_size = 2240  # sequences = 4,587,520 tokens
micro_batch_size = 10  # sequences per GPU on 224 GPUs
parallel = "hsdp"  # shard within groups of 4 GPUs, a node of Amber's; replicate across them
shard_size = 4
activation_checkpointing = "full"  # as Amber
learning_rate = 3e-4
min_learning_rate = 3e-5
warmup_steps = 2000
