package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"net"
	"net/http"
)

// passed is a request to the server, one JSON value on standard input.
type passed struct {
	Method string `json:"method"`
	Path   string `json:"path"`
	Token  string `json:"token"`
	Body   []byte `json:"body"`
}

// passedBack is the server's answer, one line on standard output.
type passedBack struct {
	Status int    `json:"status"`
	Body   []byte `json:"body"`
}

// call forwards requests, one after the other, until its input ends: one `exec` serves many of them.
func call(arguments []string, input io.Reader, output io.Writer) error {
	flags := flag.NewFlagSet("call", flag.ExitOnError)
	socket := flags.String("socket", defaultSocket, "Unix socket of serve")
	flags.Parse(arguments)
	hide() // tokens pass through
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", *socket)
		},
	}}
	requests, answers := json.NewDecoder(input), json.NewEncoder(output)
	for {
		asked := passed{}
		if err := requests.Decode(&asked); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		request, err := http.NewRequest(asked.Method, "http://sandboxd"+asked.Path, bytes.NewReader(asked.Body))
		if err != nil {
			return err
		}
		request.Header.Set("Authorization", "Bearer "+asked.Token)
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil {
			return err
		}
		if err := answers.Encode(passedBack{Status: response.StatusCode, Body: body}); err != nil {
			return err
		}
	}
}
