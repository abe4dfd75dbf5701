//! The models of Nitro-E with their official state-dict names: E-MMDiT, DC-AE, Llama, and weight files.
