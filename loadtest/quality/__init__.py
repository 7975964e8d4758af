"""What adaptive attention costs a whole model: a Hugging Face model whose attention AdaAttn serves."""
