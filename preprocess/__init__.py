"""Photos and captions in, one HDF5 file out; and a synthetic world of coloured shapes that needs no download."""
