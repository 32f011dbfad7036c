package weft_test

import (
	"go/ast"
	"go/token"
	"slices"
	"strings"
)

// checkState finds package-level variables that can change: those that cannot
// be of use unless they change (a mutex, a channel, a zero value), those whose
// initialiser makes something with a life of its own, and those that some
// function of the package writes to.
func checkState(t *tree) (found []breach) {
	for _, files := range t.byFolder(false) {
		declared := make(map[string]*ast.ValueSpec)
		for _, f := range files {
			if f.generated {
				continue
			}
			for spec, embedded := range packageVars(f.File) {
				for i, name := range spec.Names {
					if name.Name == "_" || embedded {
						continue
					}
					declared[name.Name] = spec
					if what := changes(spec, i); what != "" {
						found = append(found, breach{t.at(f, name.Pos()), name.Name + " " + what})
					}
				}
			}
		}
		for _, f := range files {
			for _, w := range writes(f.File) {
				// The parser resolves names within one file; what it leaves
				// open is the package's, or predeclared.
				spec, ok := declared[w.Name]
				if ok && (w.Obj == nil || w.Obj.Decl == spec) {
					found = append(found, breach{t.at(f, w.Pos()), w.Name + ", a variable of the package, is written to"})
				}
			}
		}
	}
	return found
}

// packageVars yields each package-level var, and whether go:embed fills it.
func packageVars(f *ast.File) map[*ast.ValueSpec]bool {
	vars := make(map[*ast.ValueSpec]bool)
	for _, d := range f.Decls {
		decl, ok := d.(*ast.GenDecl)
		if !ok || decl.Tok != token.VAR {
			continue
		}
		for _, s := range decl.Specs {
			spec, ok := s.(*ast.ValueSpec)
			if !ok {
				continue
			}
			vars[spec] = embeds(decl.Doc) || embeds(spec.Doc)
		}
	}
	return vars
}

func embeds(doc *ast.CommentGroup) bool {
	return doc != nil && slices.ContainsFunc(doc.List, func(c *ast.Comment) bool {
		return strings.HasPrefix(c.Text, "//go:embed ")
	})
}

// changes says why the variable spec.Names[i] must be state, or nothing.
func changes(spec *ast.ValueSpec, i int) string {
	if len(spec.Values) == 0 {
		return "has no value, so it is of use only if it changes"
	}
	value := spec.Values[min(i, len(spec.Values)-1)]
	switch v := value.(type) {
	case *ast.UnaryExpr:
		if v.Op == token.AND {
			return "points to something that can change"
		}
	case *ast.CallExpr:
		switch fun := v.Fun.(type) {
		case *ast.Ident:
			if fun.Name == "make" || fun.Name == "new" {
				return "is made empty, so it is of use only if it changes"
			}
		case *ast.SelectorExpr:
			if !makesValue(fun) {
				return "holds what a call made, which may change"
			}
		}
	}
	return ""
}

// makesValue tells of a call PACKAGE.NAME whether its result never changes.
func makesValue(fun *ast.SelectorExpr) bool {
	pkg, ok := fun.X.(*ast.Ident)
	if !ok {
		return false
	}
	switch call := pkg.Name + "." + fun.Sel.Name; call {
	case "errors.New", "fmt.Errorf", "fmt.Sprintf", "strings.NewReplacer", "strings.Repeat", "time.Date", "template.Must":
		return true
	}
	return strings.HasPrefix(fun.Sel.Name, "Must") || strings.HasPrefix(fun.Sel.Name, "Require") || strings.HasSuffix(fun.Sel.Name, "From4")
}

// writes lists the roots of everything that f's functions assign to, count up
// or down, delete from, clear, or take the address of.
func writes(f *ast.File) (roots []*ast.Ident) {
	add := func(e ast.Expr) {
		if id := root(e); id != nil {
			roots = append(roots, id)
		}
	}
	for _, d := range f.Decls {
		fun, ok := d.(*ast.FuncDecl)
		if !ok || fun.Body == nil {
			continue
		}
		ast.Inspect(fun.Body, func(n ast.Node) bool {
			switch s := n.(type) {
			case *ast.AssignStmt:
				if s.Tok != token.DEFINE {
					for _, left := range s.Lhs {
						add(left)
					}
				}
			case *ast.RangeStmt:
				if s.Tok == token.ASSIGN {
					add(s.Key)
					add(s.Value)
				}
			case *ast.IncDecStmt:
				add(s.X)
			case *ast.UnaryExpr:
				if s.Op == token.AND {
					add(s.X)
				}
			case *ast.CallExpr:
				id, ok := s.Fun.(*ast.Ident)
				if ok && (id.Name == "delete" || id.Name == "clear" || id.Name == "copy") && len(s.Args) > 0 {
					add(s.Args[0])
				}
			}
			return true
		})
	}
	return roots
}

// root is the variable at the left end of an expression such as a.b[c].d.
func root(e ast.Expr) *ast.Ident {
	for {
		switch x := e.(type) {
		case *ast.Ident:
			return x
		case *ast.IndexExpr:
			e = x.X
		case *ast.SelectorExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		case *ast.SliceExpr:
			e = x.X
		default:
			return nil
		}
	}
}
