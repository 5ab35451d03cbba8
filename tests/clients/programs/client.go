// net/http of Go.

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"os"
)

type task struct {
	Options   struct{ Scale float64 }
	Metadata  map[string]string
	Artifacts []struct{ Href string }
}

type problem struct {
	Code   string
	Errors []struct{ Field string }
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func call(method, path string, body io.Reader, headers map[string]string) (*http.Response, []byte) {
	request, err := http.NewRequest(method, os.Getenv("GATEWAY_URL")+path, body)
	check(err)
	request.Header.Set("Authorization", "Bearer "+os.Getenv("GATEWAY_TOKEN"))
	for name, value := range headers {
		request.Header.Set(name, value)
	}
	response, err := http.DefaultClient.Do(request)
	check(err)
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	check(err)
	return response, content
}

func submit(metadata, key string) (*http.Response, []byte) {
	image, err := os.ReadFile(os.Args[1])
	check(err)
	var body bytes.Buffer
	form := multipart.NewWriter(&body)
	check(form.WriteField("scale", "3"))
	check(form.WriteField("metadata", metadata))
	part, err := form.CreateFormFile("image", "a.png")
	check(err)
	_, err = part.Write(image)
	check(err)
	check(form.Close())
	headers := map[string]string{"Content-Type": form.FormDataContentType(), "Idempotency-Key": key}
	return call("POST", "/v1/tasks/upscale", &body, headers)
}

func main() {
	accepted, _ := submit(`{"order": "4711"}`, `"go"`)
	_, content := call("GET", accepted.Header.Get("Location"), nil, map[string]string{"Prefer": "wait"})
	var ended task
	check(json.Unmarshal(content, &ended))
	_, artifact := call("GET", ended.Artifacts[0].Href, nil, nil)
	check(os.WriteFile(os.Args[2], artifact, 0o600))
	_, content = submit("no JSON", `"go-2"`)
	var refused problem
	check(json.Unmarshal(content, &refused))
	result, err := json.Marshal(map[string]any{
		"scale": ended.Options.Scale, "order": ended.Metadata["order"],
		"code": refused.Code, "fields": []string{refused.Errors[0].Field},
	})
	check(err)
	fmt.Println(string(result))
}
