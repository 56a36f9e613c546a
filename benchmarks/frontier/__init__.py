"""How much accuracy does each rule give for how much communication?"""
