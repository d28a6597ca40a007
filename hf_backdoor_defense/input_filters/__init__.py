"""What looks at inputs: one filter, one file. Nothing here knows a trigger or a label of the inputs."""
