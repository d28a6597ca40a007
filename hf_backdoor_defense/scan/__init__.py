"""What looks at the weights of a checkpoint alone: no data, no training, no code of the checkpoint's."""
