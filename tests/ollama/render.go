// Renders requests as Ollama does, by Go's own text/template: one JSON object a line in, one out.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type request struct {
	Template string
	System   string
	Messages []message
}

// neighbours joins turns of one role, and all system messages into one text.
func neighbours(turns []message) (string, []*message) {
	var system []string
	var joined []*message
	for i := range turns {
		turn := turns[i]
		if turn.Role == "system" {
			system = append(system, turn.Content)
		}
		if n := len(joined); n > 0 && joined[n-1].Role == turn.Role && turn.Role != "tool" {
			joined[n-1].Content += "\n\n" + turn.Content
		} else {
			joined = append(joined, &turn)
		}
	}
	return strings.Join(system, "\n\n"), joined
}

func render(r request) (string, error) {
	parsed, err := template.New("").Option("missingkey=zero").Parse(r.Template)
	if err != nil {
		return "", err
	}
	turns := r.Messages
	if r.System != "" && len(turns) > 0 && turns[0].Role != "system" {
		turns = append([]message{{"system", r.System}}, turns...)
	}
	system, joined := neighbours(turns)
	var out bytes.Buffer
	err = parsed.Execute(&out, map[string]any{"System": system, "Messages": joined, "Response": ""})
	return out.String(), err
}

func main() {
	lines := bufio.NewReaderSize(os.Stdin, 1<<20)
	out := json.NewEncoder(os.Stdout)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 1 {
			var r request
			if problem := json.Unmarshal(line, &r); problem != nil {
				panic(problem)
			}
			text, failed := render(r)
			answer := map[string]string{"Text": text}
			if failed != nil {
				answer = map[string]string{"Error": failed.Error()}
			}
			out.Encode(answer)
		}
		if err != nil {
			return
		}
	}
}
