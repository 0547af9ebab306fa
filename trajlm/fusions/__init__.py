"""Static fusions: one latent per modality to one vector per stay, one file each."""
