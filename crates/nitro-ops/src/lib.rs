//! Fused tensor operations, declared once: Burn backend extensions over the CPU kernels, composed Burn operations elsewhere.
