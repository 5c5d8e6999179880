"""What a training run needs of memory and time: predicted before it starts, and measured."""
