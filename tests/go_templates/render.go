// Renders Go templates as Ollama calls them: JSON on stdin, a JSON list of texts on stdout.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string
	Content string
}

type entry struct {
	Template string
	System   string
	Messages []*message
}

func main() {
	var entries []entry
	if err := json.NewDecoder(os.Stdin).Decode(&entries); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, one := range entries {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		var text strings.Builder
		values := map[string]any{"System": one.System, "Messages": one.Messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(texts); err != nil {
		panic(err)
	}
}
