"""What `infir2 bench` measures: whole steps, decoding, single kernels, and other implementations beside ours."""
