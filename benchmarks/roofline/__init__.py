"""What methods would cost on a device, predicted from the kernels that they launch."""
