"""What a training run is made of: its options, the step, the optimizers, its processes, its folder and its log."""
