"""What kind of thing each latent stands for, layer by layer."""
