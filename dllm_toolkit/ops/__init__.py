"""Pure tensor functions: packing, selection, confidence, sampling, noise, masks, corruption. They know no state and no model."""
