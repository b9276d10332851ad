"""`make gpu`: exactness under CUDA, and what sweeps and maps of 7B shapes take there; ten minutes on one device."""
