"""Show, Attend and Tell: image captioning that says where it looked.

from captioning import load_captioner
captioner = load_captioner("flickr8k-soft")
caption = captioner.caption(["photo.jpg"], beam_size=5)[0]
"""

from captioning.api import Caption, Captioner, load_captioner

__all__ = ["Caption", "Captioner", "load_captioner"]
