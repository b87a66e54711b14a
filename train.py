"""Train a captioner: `captioning/train.py`, which is also `python -m captioning.train`.

python train.py --config flickr8k_soft --data data.h5 --output runs/soft
"""

import sys

from captioning.extras import require

if __name__ == "__main__":
    require("train.py")

from captioning.train import main

if __name__ == "__main__":
    sys.exit(main())
