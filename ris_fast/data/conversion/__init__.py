"""Other people's files turned into our shards: the original pipeline's .npz, HDF5 and MATLAB files."""
