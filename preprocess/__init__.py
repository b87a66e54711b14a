"""Photos and captions in, one HDF5 file out; and a made world of coloured shapes that needs no download."""
