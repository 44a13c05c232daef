"""How denoising steps compose into a generation: one decode, drafts that another model verifies, stages one after the other."""
