# amber_tiny with random sequences planted 1 to 64 times: memorization against repetition.
# python memorize.py configs/amber_tiny_canaries.py prints the curve after prepare_data and train.
from configs.amber_tiny import *  # noqa: F403

canaries = {1: 16, 2: 24, 4: 24, 8: 16, 16: 8, 32: 4, 64: 4}  # 800 sequences, 80 in each chunk
