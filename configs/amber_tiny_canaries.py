# amber_tiny with random sequences planted 1 to 64 times: memorization against repetition and age.
# python memorize.py configs/amber_tiny_canaries.py prints the curve after prepare_data and train.
from configs.amber_tiny import *  # noqa: F403

# Of each number a third is planted in the early, in the middle and in the late chunks.
canaries = {1: 30, 2: 27, 4: 24, 8: 18, 16: 12, 32: 6, 64: 3}  # 900 sequences, 90 in each chunk
