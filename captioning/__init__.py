"""Show, Attend and Tell: image captioning that says where it looked."""
