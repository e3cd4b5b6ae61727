"""Library of the paper: training trajectories, mini-batch losses and the curious role of the learning rate."""
