//! Training of the autoencoder, the language model and the E-MMDiT: losses, optimiser, EMA, checkpoints, progress.
