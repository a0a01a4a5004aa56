# amber_tiny with random rows planted 1 to 64 times: memorization against repetition, in minutes.
# python memorize.py configs/amber_tiny_canaries.py prints the curve after prepare_data and train.
from configs.amber_tiny import *  # noqa: F403

canaries = {1: 16, 2: 24, 4: 24, 8: 16, 16: 8, 32: 4, 64: 4}  # 800 rows, 80 in each chunk
