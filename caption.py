"""Caption photos and show where each word looked: `captioning/caption.py`, also `python -m captioning.caption`.

python caption.py photo.jpg --overlay overlays/
"""

import sys

from captioning.caption import main

if __name__ == "__main__":
    sys.exit(main())
