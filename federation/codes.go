package federation

func codes() []Documentation { return documented }

var documented = []Documentation{}
