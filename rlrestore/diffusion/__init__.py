"""Flow-coordinate diffusion mathematics: schedules, step kernels. Pure functions on tensors."""
